"""Uninformative groups are replaced: by other prompts, bounded, counted, in step with rewards, tables and sampler."""

import random
from collections import Counter

import pandas as pd
import pytest
import torch
from curriculum_trainer import with_curriculum
from datasets import Dataset
from first_fast import first_fast
from run_rows import without_clocks

from trl_entropy import DrGRPOConfig, Probe
from trl_entropy.rollouts.groups import groups_with_different_rewards
from trl_entropy.runs.directory import RunDirectory
from trl_entropy.trainer.group_resampling import chosen_groups, round_size

ON = {"resample_uninformative_groups": True}
# Two of three prompts are hopeless: no completion of theirs is ever right.
PROMPTS = [f"{name} has {i} apples." for i in range(16) for name in ("Ann", "Ben", "Cem")]


@pytest.fixture
def problems():
    return Dataset.from_dict({"prompt": PROMPTS, "is_open": [prompt.startswith("Ann") for prompt in PROMPTS]})


def reward_of(prompt, ids):
    return sum(ids) % 97 / 97 if prompt.startswith("Ann") else 0.0


def reward(prompts, completion_ids, **kwargs):
    assert kwargs["is_open"] == [prompt.startswith("Ann") for prompt in prompts]  # columns come along
    return [reward_of(prompt, ids) for prompt, ids in zip(prompts, completion_ids, strict=True)]


def num_tokens_or_none(completion_ids, **kwargs):
    return [float(len(ids)) if len(ids) > 2 else None for ids in completion_ids]


class Recorder(Probe):
    def __init__(self):
        super().__init__(1)
        self.rollouts, self.micro_batches = [], []

    def on_rollouts(self, args, state, control, *, metrics, rollouts, **kwargs):
        self.rollouts.append(rollouts)

    def on_micro_batch(self, args, state, control, *, metrics, inputs, **kwargs):
        self.micro_batches.append(inputs)


@pytest.fixture
def trained(make_trainer, problems):
    """trained(**settings): the run's rollouts, metrics and trainer; completions of 1 to 12 random tokens."""

    def train(seed=0, **settings):
        recorder, draw = Recorder(), random.Random(seed)
        defaults = {"per_device_train_batch_size": 32, "reward_funcs": reward, "dataset": problems}
        trainer = make_trainer(callbacks=[recorder], **(defaults | settings))

        def completions(prompt_ids, *args):
            return [[draw.randrange(2, 400) for _ in range(draw.randint(1, 12))] for _ in prompt_ids], None

        if not trainer.use_vllm and not hasattr(trainer, "vllm_generation"):
            trainer._generate_single_turn = completions
        trainer.train()
        return recorder, RunDirectory(trainer.args.output_dir).metrics(), trainer

    return train


def texts_of(trainer, ids, mask):
    return [trainer._tokenizer.decode(row[m.bool()]) for row, m in zip(ids, mask, strict=True)]


def flat(model):
    return torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])


# ---- what is chosen


def test_equal_rewards_are_uninformative_and_unscored_ones_no_evidence():
    nan = torch.nan
    rewards = torch.tensor([[1.0, 1, 1], [0, 1, 0], [nan, 2, 2], [nan, 2, 3], [nan, nan, nan], [nan, 1, nan]])
    order = torch.randperm(18, generator=torch.Generator().manual_seed(0))
    groups = torch.arange(18) // 3
    for index in (torch.arange(18), order):
        informative = groups_with_different_rewards(rewards.flatten()[index], groups[index])
        assert informative.tolist() == [False, True, False, True, False, False]


def test_a_round_is_as_large_as_is_expected_to_do():
    assert round_size(num_missing=3, num_informative=5, num_drawn=8, unit=1, most=8) == 5  # 3 / (5 / 8) = 4.8
    assert round_size(3, 5, 8, unit=2, most=8) == 6  # shared evenly
    assert round_size(6, 2, 8, unit=1, most=8) == 8  # no more than a generation
    assert round_size(8, 0, 16, unit=1, most=8) == 8
    assert round_size(1, 8, 9, unit=4, most=8) == 4


def test_the_first_ones_drawn_are_taken():
    first, second, third = (torch.tensor(x, dtype=torch.bool) for x in ([1, 0, 0, 1, 0, 0], [0, 1, 1], [1, 0, 0, 0]))
    expected = [(0, 0), (1, 1), (1, 2), (0, 3), (2, 0), (0, 5)]
    assert chosen_groups([first, second, third]) == expected
    assert chosen_groups([first, second]) == [(0, 0), (1, 1), (1, 2), (0, 3), (0, 4), (0, 5)]


# ---- what is trained on


@pytest.mark.parametrize(
    "settings",
    first_fast(
        [
            {},
            {"curriculum": "pass_rate"},
            {"num_prompts_per_step": 8, "per_device_train_batch_size": 8},
            {"per_device_train_batch_size": 16, "steps_per_generation": 2, "num_iterations": 2},
            {"length_normalizer": "group_max", "scale_rewards": "group"},
            {"loss_type": "dapo"},
        ],
        2,
    ),
    ids=str,
)
def test_a_step_learns_from_other_prompts_instead(trained, settings):
    recorder, _, trainer = trained(**ON, max_resample_rounds=20, max_steps=2, log_completions=True,
                                      num_completions_to_print=0, **settings)  # fmt: skip
    first = recorder.rollouts[0]
    assert first.accepted.all() and len(first.rewards) in (16, 32)
    for rollouts in recorder.rollouts:
        prompts = texts_of(trainer, rollouts.prompt_ids, rollouts.prompt_mask)
        lengths = rollouts.lengths.tolist()
        expected = [
            reward_of(prompt, ids[:length].tolist())
            for prompt, ids, length in zip(prompts, rollouts.completion_ids, lengths, strict=True)
        ]
        assert rollouts.rewards.tolist() == pytest.approx(expected)  # every row has its own reward
        for number in rollouts.prompt_index.unique():
            rows_of = (rollouts.prompt_index == number).nonzero().flatten().tolist()
            assert len(rows_of) == 4 and len({prompts[i] for i in rows_of}) == 1
            mean = sum(expected[i] for i in rows_of) / 4
            spread = torch.tensor([expected[i] for i in rows_of]).std().item() + 1e-4
            scale = spread if settings.get("scale_rewards") else 1.0
            advantages = [(expected[i] - mean) / scale for i in rows_of]
            assert rollouts.raw_advantages[rows_of].tolist() == pytest.approx(advantages, abs=1e-5)
        assert all(count == 4 for count in Counter(prompts).values())  # prompts are distinct
    index = torch.cat([rollouts.prompt_index for rollouts in recorder.rollouts])
    assert index.unique().tolist() == list(range(int(index.max()) + 1))
    num_tokens = [batch["num_items_in_batch"] for batch in recorder.micro_batches]
    in_batch = sum(int(r.completion_mask.sum()) for r in recorder.rollouts[: 2 if "num_iterations" in settings else 1])
    if settings.get("num_iterations") is None:
        assert int(num_tokens[0]) == in_batch
    table = pd.read_parquet(f"{trainer.args.output_dir}/completions/completions_00001.parquet")
    assert table["prompt"].str.startswith("Ann").all() and table["reward"].nunique() > 8
    if len(table) == len(first.rewards):
        assert sorted(table["reward"]) == pytest.approx(sorted(first.rewards.tolist()))
        assert sorted(table["advantage"]) == pytest.approx(sorted(first.raw_advantages.tolist()), abs=1e-5)


def test_metrics_count_and_trls_are_of_the_first_draw(trained):
    metric = {"metric_funcs": [num_tokens_or_none]}
    _, rows, _ = trained(**ON, max_resample_rounds=20, max_steps=1, **metric)
    _, off, _ = trained(max_steps=1, **metric)
    row, plain = rows[0], off[0]
    for name in (
        "metrics/num_tokens_or_none/mean",
        "metrics/num_tokens_or_none/mean_stderr",
        "reward",
        "reward_std",
        "frac_reward_zero_std",
        "completions/mean_length",
        "rewards/reward/mean",
    ):
        assert row[name] == plain[name], name
    assert row["num_tokens"] > plain["num_tokens"]  # those of all rounds
    assert row["resampling/num_uninformative"] == 8 * row["frac_reward_zero_std"] > 0
    assert row["resampling/num_kept_uninformative"] == 0 and 1 <= row["resampling/num_rounds"] <= 20
    generated = row["resampling/num_completions"]
    assert row["resampling/completions_per_accepted_group"] == generated / 8 > 4
    informative = 8 + row["resampling/num_unused"]
    assert row["resampling/informative_share"] == informative / (generated / 4)
    assert row["time/resampling"] > 0 and not any(key.startswith("resampling/") for key in plain)
    tokens = (row["num_tokens"] - plain["num_tokens"]) / (generated - 32)  # prompts are there too
    assert tokens > row["resampling/tokens_per_accepted_group"] * 8 / generated > 4


@pytest.mark.parametrize("rounds", [1, 3])
def test_the_bound_holds_and_what_is_left_is_kept_and_counted(trained, problems, rounds):
    hopeless = problems.filter(lambda row: not row["is_open"])
    recorder, rows, _ = trained(
        **ON, max_resample_rounds=rounds, max_steps=1, dataset=hopeless, per_device_train_batch_size=16
    )
    row = rows[0]
    assert row["resampling/num_rounds"] == rounds and row["resampling/num_kept_uninformative"] == 4
    assert row["resampling/num_completions"] == 16 * (1 + rounds) and row["grad_norm"] == 0
    assert "resampling/completions_per_accepted_group" not in row and len(recorder.rollouts[0].rewards) == 16


def test_prompts_run_out(trained, problems):
    """4 + 1 prompts: one round of one prompt, then there is no other."""
    few = problems.filter(lambda row: not row["is_open"]).select(range(5))
    _, rows, _ = trained(**ON, max_resample_rounds=9, max_steps=1, dataset=few, per_device_train_batch_size=16)
    assert rows[0]["resampling/num_rounds"] == 1 and rows[0]["resampling/num_completions"] == 20


@pytest.mark.parametrize("settings", [{}, {"curriculum": "pass_rate"}], ids=str)
def test_where_all_are_informative_training_is_as_without(trained, problems, settings):
    open_ones = problems.filter(lambda row: row["is_open"])
    runs = [trained(dataset=open_ones, max_steps=3, **toggle, **settings) for toggle in ({}, ON)]
    (_, off, plain), (_, on, resampling) = runs
    assert torch.equal(flat(plain.model), flat(resampling.model))
    assert without_clocks(on, ("resampling/",)) == without_clocks(off)
    assert all(row["resampling/completions_per_accepted_group"] == 4 for row in on)


def test_the_curriculum_learns_from_replaced_groups_too(trained):
    settings = {"curriculum": "pass_rate", "trainer_class": with_curriculum(pass_reward=1e-9, ema=1.0)}
    _, rows, trainer = trained(**ON, **settings, max_steps=1, max_resample_rounds=20)
    drawn = rows[0]["resampling/num_completions"] / 4
    learned = (trainer._train_sampler.rates != 0.5).sum()
    assert drawn - 2 <= learned <= drawn and drawn > 8  # a rate may come out at 0.5
    sizes = [rows[0][f"curriculum/num_{name}"] for name in ("hard", "normal", "easy")]
    assert sum(sizes) == len(PROMPTS) and sizes[0] == (trainer._train_sampler.rates < 0.2).sum()


# ---- vLLM


class FakeVLLM:
    """Its log-probabilities spell the tokens, so that a row in the wrong place is seen."""

    def __init__(self):
        self.calls, self.syncs, self.draw = [], 0, random.Random(0)

    def sync_weights(self):
        self.syncs += 1

    def generate(self, prompts, images, num_generations, profiler):
        assert all(p == prompts[i - i % num_generations] for i, p in enumerate(prompts))  # whole groups in order
        self.calls.append(len(prompts))
        ids = [[self.draw.randrange(2, 400) for _ in range(self.draw.randint(1, 12))] for _ in prompts]
        return prompts, ids, [[[-token / 100] for token in row] for row in ids], None


def test_vllm_rows_keep_their_logprobs(trained, make_trainer, problems):
    recorder, fake = Recorder(), FakeVLLM()
    trainer = make_trainer(
        callbacks=[recorder], dataset=problems, reward_funcs=reward, per_device_train_batch_size=32, max_steps=2,
        max_resample_rounds=20, **ON,
    )  # fmt: skip
    trainer.use_vllm, trainer.vllm_generation, trainer._last_loaded_step = True, fake, -1
    trainer.train()
    rows = RunDirectory(trainer.args.output_dir).metrics()
    assert fake.syncs == 2 and len(fake.calls) == 2 + sum(row["resampling/num_rounds"] for row in rows)
    assert fake.calls[0] == 32 and max(fake.calls) == 32
    for batch in recorder.micro_batches:
        mask = batch["completion_mask"].bool()
        spelled = -batch["completion_ids"] / 100
        assert torch.allclose(batch["sampling_per_token_logps"][mask], spelled[mask])
        assert batch["importance_sampling_ratio"].shape[0] == len(mask) == 32
        ratio = (batch["old_per_token_logps"] - batch["sampling_per_token_logps"]).exp()
        if batch["importance_sampling_ratio"].shape == ratio.shape:
            assert torch.allclose(batch["importance_sampling_ratio"][mask], ratio[mask].clamp(max=3.0), rtol=1e-4)


# ---- refusals


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_resample_rounds": 0}, "max_resample_rounds is 0; use 1 or more"),
        ({"scale_rewards": "batch"}, "scale_rewards='none' or 'group'"),
        ({"multi_objective_aggregation": "normalize_then_sum"}, "multi_objective_aggregation='sum_then_normalize'"),
        ({"noise_scale_probe": True, "beta": 0.1}, r"Set beta=0, .*\(or resample_uninformative_groups=False\)"),
    ],
    ids=str,
)
def test_settings_that_do_not_go_together(settings, message):
    with pytest.raises(ValueError, match=message):
        DrGRPOConfig(**{"output_dir": "x", "bf16": False, "use_cpu": True, "num_generations": 4} | ON | settings)


def test_data_that_cannot_be_drawn_from(make_trainer, problems):
    with pytest.raises(ValueError, match="resample_uninformative_groups=True draws rows by number; a streamed"):
        make_trainer(dataset=problems.to_iterable_dataset(), **ON)
    with pytest.raises(ValueError, match=r"there are images \(train_dataset: image\)"):
        make_trainer(dataset=problems.add_column("image", [None] * len(problems)), **ON)
