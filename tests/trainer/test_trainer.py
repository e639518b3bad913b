"""What a step trains on and logs: whole groups, exact ratios, probes that leave no trace, a clean end on SIGTERM."""

import os
import signal
from pathlib import Path

import pytest
import torch
from accelerate.utils import set_seed
from curriculum_trainer import with_curriculum
from datasets import Dataset
from peft import LoraConfig
from run_rows import without_clocks
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from trl_entropy import DrGRPOTrainer, Probe
from trl_entropy.engine.plain import PlainEngine
from trl_entropy.preflight import support
from trl_entropy.rollouts.groups import group_numbers, whole_group_shuffling
from trl_entropy.runs.directory import RunDirectory


class Recorder(Probe):
    """Keeps what the events hand out."""

    def __init__(self, every=1):
        super().__init__(every)
        self.micro_batches, self.rollouts, self.updates, self.steps = [], [], [], []

    def on_micro_batch(self, args, state, control, *, metrics, inputs, **kwargs):
        self.micro_batches.append(inputs)

    def on_rollouts(self, args, state, control, *, metrics, rollouts, **kwargs):
        self.steps.append(state.global_step + 1)
        self.rollouts.append(rollouts)
        metrics["recorder/num_rows"] = len(rollouts.rewards)

    def on_after_update(self, args, state, control, *, metrics, update, **kwargs):
        self.updates.append(torch.cat([value.flatten() for value in update.update.values()]))


def flat(model) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])


def test_one_step_equals_trl(make_trainer):
    ours = make_trainer(max_steps=1)
    start = flat(ours.model).clone()
    ours.train()  # before the other one is made: a trainer seeds everything when it is built
    theirs = make_trainer(
        GRPOTrainer, GRPOConfig, max_steps=1, loss_type="dr_grpo", scale_rewards="none", beta=0.0, top_k=0
    )
    theirs.train()
    # The rows of the one micro-batch stand in another order, so the sums round differently; AdamW's first step
    # divides the gradient by its own size, which makes coordinates with a gradient of rounding size arbitrary.
    agree = (flat(ours.model) - flat(theirs.model)).abs() < 1e-5
    assert agree.float().mean() > 0.99
    assert (flat(ours.model) - start).abs().max() > 5e-4


class WithWholeGroups(GRPOTrainer):
    """TRL's trainer, but with this package's shuffle."""

    def _generate_and_score_completions(self, inputs):
        batch = super()._generate_and_score_completions(inputs)
        batch["prompt_index"] = group_numbers(len(inputs), self.num_generations, 0, self.accelerator.device)
        return batch

    def _prepare_inputs(self, generation_batch):
        with whole_group_shuffling():
            return super()._prepare_inputs(generation_batch)


def test_toggles_off_is_trl_with_whole_groups_shuffled(make_trainer):
    settings = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 8, "max_steps": 3}
    ours = make_trainer(**settings)
    ours.train()
    defaults = {"loss_type": "dr_grpo", "scale_rewards": "none", "beta": 0.0, "top_k": 0}
    equal, other = (make_trainer(kind, GRPOConfig, **settings, **defaults) for kind in (WithWholeGroups, GRPOTrainer))
    for theirs in (equal, other):
        set_seed(theirs.args.seed, device_specific=True)
        theirs.train()
    assert torch.equal(flat(ours.model), flat(equal.model))
    assert not torch.equal(flat(ours.model), flat(other.model))


def test_first_step_is_on_policy(make_trainer):
    trainer = make_trainer(kl_every=1, num_iterations=2, max_steps=2)
    trainer.train()
    first, second = RunDirectory(trainer.args.output_dir).metrics()
    for key in ("ratio/mean", "ratio/median", "ratio/p90", "ratio/p99", "ratio/max"):
        assert first[key] == pytest.approx(1.0, abs=1e-5), key
    assert first["kl"] == pytest.approx(0.0, abs=1e-10)
    assert second["kl"] > 1e-5 and second["ratio/max"] > 1.001  # the same completions, one step off their policy


def test_kl_is_zero_at_the_first_step_with_a_reference(make_trainer):
    trainer = make_trainer(beta=0.1, max_steps=1)
    trainer.train()
    assert RunDirectory(trainer.args.output_dir).metrics()[0]["kl"] == pytest.approx(0.0, abs=1e-10)


def test_logged_kl_is_that_to_the_start_policy(make_trainer):
    recorder = Recorder()
    trainer = make_trainer(kl_every=2, max_steps=2, callbacks=[recorder])
    start = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    between = {}

    class Keep(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 1:
                between.update({name: p.detach().clone() for name, p in trainer.model.named_parameters()})

    trainer.add_callback(Keep())
    trainer.train()
    rollouts = recorder.rollouts[1]
    logps = []
    for values in (between, start):
        trainer.model.load_state_dict(values, strict=False)
        with torch.no_grad():
            logits = trainer.model(input_ids=rollouts.input_ids, attention_mask=rollouts.attention_mask).logits
        width = rollouts.completion_ids.shape[1]
        scores = logits[:, -width - 1 : -1].double().log_softmax(-1)
        logps.append(scores.gather(2, rollouts.completion_ids.unsqueeze(2)).squeeze(2))
    difference = logps[1] - logps[0]
    expected = ((difference.exp() - difference - 1) * rollouts.completion_mask).sum() / rollouts.completion_mask.sum()
    rows = RunDirectory(trainer.args.output_dir).metrics()
    assert "kl" not in rows[0]
    assert rows[1]["kl"] == pytest.approx(expected.item(), rel=1e-3)


def test_every_step_logs_what_is_promised(make_trainer):
    from trl_entropy.runs.metrics import METRICS

    trainer = make_trainer(
        kl_every=1, effective_sample_size_probe=True, optimizer_state_probe=True, stop_at_answer=True, max_steps=2,
        likelihood_probe=True,
    )  # fmt: skip
    trainer.train()
    not_here = {"completions/think_length"}  # a random policy may close no think tag
    of_other_probes = (
        *("entropy/", "answer_check/", "noise_scale/", "fisher/", "curriculum/", "resampling/"),
        *("entropy_control/", "token_control/", "sampling/", "reward/", "length/", "truncated/"),
        "mutual_information/",
    )
    promised = {name for name in METRICS if not name.startswith(of_other_probes)} - not_here
    promised |= {"entropy/policy", "entropy/surprisal", "clip_ratio/region_mean", "reward_std"}
    for row in RunDirectory(trainer.args.output_dir).metrics():
        assert promised <= row.keys(), promised - row.keys()
        assert row["entropy/policy"] == pytest.approx(row["entropy"], rel=1e-5)  # one micro-batch: TRL's own mean
        assert row["entropy/policy"] == pytest.approx(row["entropy/surprisal"], rel=0.2)  # equal in expectation
        assert row["ess/importance_weights"] == pytest.approx(16)
        assert row["ess/loss_weights"] == pytest.approx(row["ess/num_completions"])


def test_think_length_is_counted_in_tokens(make_trainer, tokenizer):
    trainer = make_trainer()
    trainer.model.train()
    trainer._record_think_length([" 3 + 4 = 7 </think> <answer>7</answer>", "no tag", [{"content": " 3 </think> x"}]])
    expected = (len(tokenizer(" 3 + 4 = 7 ")["input_ids"]) + len(tokenizer(" 3 ")["input_ids"])) / 2
    assert trainer._metrics["train"]["completions/think_length"] == [expected]


@pytest.mark.parametrize("accumulation", [1, 2, 4])
def test_micro_batches_hold_whole_groups(make_trainer, accumulation):
    recorder = Recorder()
    trainer = make_trainer(
        callbacks=[recorder],
        per_device_train_batch_size=32 // accumulation,
        gradient_accumulation_steps=accumulation,
        length_normalizer="group_max",
    )
    trainer.train()
    assert len(recorder.micro_batches) == 2 * accumulation and len(recorder.rollouts) == 2
    for batch in recorder.micro_batches:
        assert batch["prompt_index"].bincount().unique().tolist() in ([4], [0, 4])
    first, second = (rollouts.prompt_index.unique() for rollouts in recorder.rollouts)
    assert len(first) == len(second) == 8 and not set(first.tolist()) & set(second.tolist())


def test_groups_are_shuffled(make_trainer):
    recorder = Recorder()
    make_trainer(callbacks=[recorder], per_device_train_batch_size=32, max_steps=1).train()
    index = recorder.rollouts[0].prompt_index
    assert index.tolist() != sorted(index.tolist())
    assert torch.equal(index, index.view(-1, 4)[:, :1].expand(-1, 4).flatten())


def test_rollouts_carry_raw_advantages_and_scales(make_trainer):
    recorder = Recorder()
    trainer = make_trainer(callbacks=[recorder], length_normalizer="group_max", max_steps=1)
    trainer.train()
    rollouts = recorder.rollouts[0]
    for group in rollouts.prompt_index.unique():
        rows = rollouts.prompt_index == group
        rewards = rollouts.rewards[rows]
        assert torch.allclose(rollouts.raw_advantages[rows], rewards - rewards.mean(), atol=1e-6)
        scale = trainer.max_completion_length / rollouts.lengths[rows].max()
        assert torch.allclose(rollouts.length_scale[rows], scale.float().expand(len(rewards)))
    assert torch.equal(rollouts.advantages, rollouts.raw_advantages * rollouts.length_scale)
    rewards = [
        sum(t % 2 for t in ids[m.bool()].tolist()) / int(m.sum())
        for ids, m in zip(rollouts.completion_ids, rollouts.completion_mask, strict=True)
    ]
    assert rollouts.rewards.tolist() == pytest.approx(rewards)


def test_probes_on_is_probes_off_bit_for_bit(make_trainer):
    runs = []
    for probes in ({}, {"effective_sample_size_probe": True, "optimizer_state_probe": True, "kl_every": 1}):
        trainer = make_trainer(max_steps=3, gradient_accumulation_steps=2, **probes)
        trainer.train()
        runs.append((flat(trainer.model), without_clocks(RunDirectory(trainer.args.output_dir).metrics())))
    (off, off_rows), (on, on_rows) = runs
    assert torch.equal(off, on)
    for off_row, on_row in zip(off_rows, on_rows, strict=True):
        assert off_row.items() <= on_row.items()


def test_a_probe_of_ones_own_gets_the_update_on_its_cadence(make_trainer):
    recorder = Recorder(every=2)
    trainer = make_trainer(callbacks=[recorder], max_steps=4)
    positions = []

    class Keep(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            positions.append(flat(trainer.model).clone())

    trainer.add_callback(Keep())
    trainer.train()
    assert recorder.steps == [2, 4]
    assert torch.equal(recorder.updates[0], positions[1] - positions[0])
    assert torch.equal(recorder.updates[1], positions[3] - positions[2])
    rows = RunDirectory(trainer.args.output_dir).metrics()
    assert [row.get("recorder/num_rows") for row in rows] == [None, 16, None, 16]


def test_optimizer_state_is_summarised(make_trainer):
    trainer = make_trainer(optimizer_state_probe=True, max_steps=2)
    trainer.train()
    row = RunDirectory(trainer.args.output_dir).metrics()[-1]
    squares = torch.cat([state["exp_avg_sq"].flatten() for state in trainer.optimizer.state.values()])
    assert row["optimizer_state/exp_avg_sq_num_zero"] == (squares == 0).sum()
    assert row["optimizer_state/exp_avg_sq_num_below_eps_sq"] == (squares < 1e-16).sum()
    median = squares[squares > 0].median().item()
    assert row["optimizer_state/exp_avg_sq_p50"] == pytest.approx(median, rel=0.04)


def test_completions_stop_at_the_answer(make_trainer, tokenizer, monkeypatch):
    monkeypatch.setattr("trl_entropy.trainer.dr_grpo.ANSWER_CLOSE", "e")  # a random policy writes that
    recorder = Recorder()
    trainer = make_trainer(stop_at_answer=True, callbacks=[recorder], max_steps=1, per_device_train_batch_size=32)
    trainer.train()
    rollouts, stopped = recorder.rollouts[0], 0
    for ids, mask in zip(rollouts.completion_ids, rollouts.completion_mask, strict=True):
        text = tokenizer.decode(ids[mask.bool()])
        before = tokenizer.decode(ids[: int(mask.sum()) - 1])
        assert "e" not in before
        stopped += "e" in text
    row = RunDirectory(trainer.args.output_dir).metrics()[0]
    assert 0 < stopped < 32
    assert row["completions/answered"] == pytest.approx(stopped / 32)
    ended = sum(
        tokenizer.eos_token_id in ids[mask.bool()].tolist()
        for ids, mask in zip(rollouts.completion_ids, rollouts.completion_mask, strict=True)
    )
    assert row["completions/clipped_ratio"] == pytest.approx(1 - (stopped + ended) / 32)
    assert not hasattr(trainer.model, "__dict__") or "generate" not in vars(trainer.model)


def test_conversational_prompts(make_trainer, tokenizer, problems, monkeypatch):
    template = "{% for m in messages %}{{ m['content'] }}{% endfor %}{% if add_generation_prompt %} :{% endif %}"
    monkeypatch.setattr(tokenizer, "chat_template", template)
    dataset = problems.map(lambda row: {"prompt": [{"role": "user", "content": row["prompt"]}]})
    trainer = make_trainer(dataset=dataset, stop_at_answer=True, effective_sample_size_probe=True)
    trainer.train()
    assert len(RunDirectory(trainer.args.output_dir).metrics()) == 2


def test_lora(make_trainer):
    from peft import LoraConfig

    peft_config = LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.0, task_type="CAUSAL_LM")
    trainer = make_trainer(peft_config=peft_config, kl_every=1, optimizer_state_probe=True)
    trainer.train()
    rows = RunDirectory(trainer.args.output_dir).metrics()
    assert rows[0]["kl"] == pytest.approx(0.0, abs=1e-10) and rows[1]["kl"] > 0


def test_sigterm_writes_a_checkpoint_and_ends(make_trainer):
    class Send(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 1:
                os.kill(os.getpid(), signal.SIGTERM)

    handler = signal.getsignal(signal.SIGTERM)
    trainer = make_trainer(callbacks=[Send()], max_steps=5)
    trainer.train()
    assert trainer.state.global_step == 2
    assert os.path.exists(os.path.join(trainer.args.output_dir, "checkpoint-2", "trainer_state.json"))
    assert len(RunDirectory(trainer.args.output_dir).metrics()) == 2
    assert signal.getsignal(signal.SIGTERM) is handler


def test_a_plain_grpo_config_is_refused(make_trainer):
    with pytest.raises(TypeError, match="GRPOConfig; DrGRPOTrainer needs a DrGRPOConfig"):
        make_trainer(DrGRPOTrainer, GRPOConfig)


def test_the_curriculum_learns_from_every_scored_group(make_trainer, tmp_path):
    """Prompts of "Ann" always pass, others never: with no weight on the easy ones they are not drawn again."""
    prompts = [f"{name} has {i} apples." for name in ("Ann", "Ben") for i in range(8)]

    def reward(prompts, **kwargs):
        return [float(prompt.startswith("Ann")) for prompt in prompts]

    recorder = Recorder()
    settings = {"curriculum": "pass_rate", "trainer_class": with_curriculum(weights=(1.0, 2.0, 0.0), ema=1.0)}
    trainer = make_trainer(
        dataset=Dataset.from_dict({"prompt": prompts}),
        reward_funcs=reward,
        callbacks=[recorder],
        max_steps=8,
        **settings,
    )
    trainer.train()
    rates = trainer._train_sampler.rates.tolist()
    drawn = [trainer._tokenizer.decode(ids[mask.bool()]) for batch in recorder.rollouts for ids, mask in zip(
        batch.prompt_ids, batch.prompt_mask, strict=True)][::4]  # fmt: skip
    for row, prompt in enumerate(prompts):
        seen = prompt in drawn
        assert rates[row] == (float(prompt.startswith("Ann")) if seen else 0.5)
        assert not prompt.startswith("Ann") or drawn.count(prompt) <= 2  # one more may be fetched ahead
    row = RunDirectory(trainer.args.output_dir).metrics()[-1]
    assert row["curriculum/num_easy"] == sum(rate == 1 for rate in rates) > 0
    assert row["curriculum/num_hard"] == sum(rate == 0 for rate in rates) > 0


def test_probes_that_take_any_kernel_do_not_score(make_trainer, monkeypatch):
    """What the doctor's table takes as independent of attention and quantisation puts no float32 model to use."""
    independent = [name for name, axes in support.DEPENDS_ON.items() if "attention" not in axes]
    assert independent == [name for name, axes in support.DEPENDS_ON.items() if "quantisation" not in axes]
    *probes, kl = independent
    assert kl == "kl_every"

    def fail(*args, **kwargs):
        raise AssertionError("a float32 model was asked for")

    monkeypatch.setattr(PlainEngine, "scoring_model", fail)
    adapter = LoraConfig(r=2, target_modules="all-linear", lora_dropout=0.0)
    trainer = make_trainer(peft_config=adapter, kl_every=1, **dict.fromkeys(probes, True))
    trainer.train()
    row = RunDirectory(trainer.args.output_dir).metrics()[-1]
    prefixes = {"noise_scale_probe": "noise_scale/", "optimizer_state_probe": "optimizer_state/"}
    prefixes |= {"effective_sample_size_probe": "ess/", "kl_every": "kl"}
    assert all(any(key.startswith(prefixes[name]) for key in row) for name in independent)


def test_model_card_cites_the_method_and_names_the_base_model(make_trainer, model_path, tmp_path):
    trainer = make_trainer(output_dir=str(tmp_path / "run"), max_steps=1, save_strategy="steps", save_steps=1)
    trainer.train()
    card = (tmp_path / "run" / "README.md").read_text()
    assert "2503.20783" in card and "2402.03300" not in card and "DrGRPO" in card
    assert "None" not in card and f"the local model `{Path(model_path).name}`" in card
