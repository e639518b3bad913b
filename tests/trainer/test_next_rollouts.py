"""The entropy change of a step, measured on the next step's completions: recomputed, resumed, refused."""

import pytest
import torch
from datasets import Dataset
from first_fast import first_fast
from peft import LoraConfig
from run_rows import without_clocks
from safetensors import safe_open
from test_entropy_probe import KeepParameters, entropy_float64, flat, probe_file
from transformers import AutoModelForCausalLM, TrainerCallback

from trl_entropy.probes.next_rollouts import rows_of_first_groups
from trl_entropy.runs.directory import RunDirectory

PROBE = {"entropy_probe": True, "probe_batch_size": 5}


@pytest.fixture(scope="module")
def problems():
    names = ("Ann", "Ben", "Cem", "Dia", "Eva", "Fay")
    return Dataset.from_dict({"prompt": [f"{name} has {i} apples." for name in names for i in range(8)]})


def test_changes_are_those_of_a_float64_recomputation(make_trainer, problems, model_path):
    """Drawn by the policy after the step, weighed back to the one before it; the last step on a draw of its own."""
    trainer = make_trainer(max_steps=3, per_device_train_batch_size=32, dataset=problems, **PROBE)
    keep = KeepParameters(trainer.model)
    trainer.add_callback(keep)
    trainer.train()
    run = RunDirectory(trainer.args.output_dir)
    model = AutoModelForCausalLM.from_pretrained(model_path)
    rows_logged = run.metrics()
    assert [row["step"] for row in rows_logged] == [1, 2, 3]
    for step, row in enumerate(rows_logged, start=1):
        rows, metadata = probe_file(run, step)
        assert (metadata["step"], metadata["drawn"]) == (str(step), "after the step")
        assert float(metadata["learning_rate"]) == pytest.approx(row["learning_rate"])
        before, after = keep.points[step - 1], keep.points[step]
        end, sampling = entropy_float64(model, after, rows)
        start, logps_before = entropy_float64(model, before, rows, sampling)
        assert row["entropy/probe_batch"] == pytest.approx(start, rel=1e-5)
        assert row["entropy/delta_measured"] == pytest.approx(end - start, rel=1e-3)
        assert row["reward/delta_measured"] == pytest.approx(reward_change(rows, logps_before, sampling), rel=1e-3)
        if step == 2:
            continue

        def along(scale, before=before, after=after, rows=rows, sampling=sampling):
            point = {name: before[name] + scale * (after[name] - before[name]) for name in before}
            return entropy_float64(model, point, rows, sampling)[0]

        e = 1e-3
        slope = (along(e) - along(-e)) / (2 * e)
        slope_after = (along(1 + e) - along(1 - e)) / (2 * e)

        def reward_along(scale, before=before, after=after, rows=rows, sampling=sampling):
            point = {name: before[name] + scale * (after[name] - before[name]) for name in before}
            return -reward_change(rows, entropy_float64(model, point, rows)[1], sampling)

        slopes = [(reward_along(s + e) - reward_along(s - e)) / (2 * e) for s in (0, 1)]
        assert row["reward/delta_linear"] == pytest.approx(slopes[0], rel=1e-3)
        assert row["reward/delta_trapezoid"] == pytest.approx(sum(slopes) / 2, rel=1e-3)
        assert row["entropy/delta_linear"] == pytest.approx(slope, rel=1e-3)
        assert row["entropy/delta_trapezoid"] == pytest.approx((slope + slope_after) / 2, rel=1e-3)
    # E of a step is a part of the next step's rollouts, in whole groups.
    for step in (1, 2):
        rows, _ = probe_file(run, step)
        with safe_open(run.path / "probes" / "rollouts" / f"step_{step + 1:06d}.safetensors", "pt") as file:
            following = {tuple(ids) for ids in file.get_tensor("input_ids").tolist()}
        assert len(rows["input_ids"]) == 16 and {tuple(ids) for ids in rows["input_ids"].tolist()} <= following
        assert rows["prompt_index"].unique(return_counts=True)[1].tolist() == [4] * 4


def reward_change(rows, logps, sampling):
    """(T21) by loops: from the policy of `logps` to that of `sampling`, which drew the rows."""
    rewards, prompts = rows["value/reward"].tolist(), rows["prompt_index"].tolist()
    grouped, total = len(set(prompts)) < len(prompts), 0.0
    for i, mask in enumerate(rows["completion_mask"]):
        weight = float(((logps[i] - sampling[i]) * mask).sum().exp())
        alike = [j for j in range(len(rewards)) if j != i and (not grouped or prompts[j] == prompts[i])]
        total += (1 - weight) * (rewards[i] - sum(rewards[j] for j in alike) / len(alike))
    return total / len(rewards)


def test_within_a_generation_the_policy_that_drew_it_gives_the_weights(make_trainer, problems, model_path):
    """Steps 1 and 2, 3 and 4 share a generation: the completions of step 2 were drawn before step 1, at theta_0."""
    trainer = make_trainer(
        max_steps=3, per_device_train_batch_size=16, steps_per_generation=2, dataset=problems, **PROBE
    )
    keep = KeepParameters(trainer.model)
    trainer.add_callback(keep)
    trainer.train()
    run = RunDirectory(trainer.args.output_dir)
    model = AutoModelForCausalLM.from_pretrained(model_path)
    for step, drawn_at in ((1, 0), (2, 2)):
        row, (rows, metadata) = run.metrics()[step - 1], probe_file(run, step)
        sampling = entropy_float64(model, keep.points[drawn_at], rows)[1]
        start, end = (entropy_float64(model, keep.points[s], rows, sampling)[0] for s in (step - 1, step))
        assert row["entropy/delta_measured"] == pytest.approx(end - start, rel=1e-3)
        assert metadata["sampler"] == ("an earlier policy" if step == 1 else "policy")
        if step == 1:
            assert torch.allclose(rows["sampling_logps"].double(), sampling * rows["completion_mask"], atol=1e-4)


SETTINGS = {
    "plain": {},
    "accumulation": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 8},
    "window": {"steps_per_generation": 2},
    "window inside a step": {"gradient_accumulation_steps": 2, "steps_per_generation": 1},
    "lora, by token": {"lora": True, "entropy_attribution": "token"},
    "other loss and optimizer": {"loss_type": "dapo", "optim": "sgd", "entropy_probe_every": 2},
    "selected prompts": {
        "resample_uninformative_groups": True,
        "curriculum": "pass_rate",
        "reward_funcs": lambda completion_ids, **_: [float(sum(ids) % 5 == 0) for ids in completion_ids],
    },
    "measured alone": {"entropy_prediction": "none"},
}


DEFAULTS = {"entropy_attribution": "none", "entropy_prediction": "trapezoid", "entropy_probe_every": 1}


@pytest.mark.parametrize("case", first_fast(SETTINGS))
def test_probe_on_is_probe_off_and_resumed_is_uninterrupted_bit_for_bit(make_trainer, problems, tmp_path, case):
    """A checkpoint falls between each step and its measurement."""
    settings = dict(SETTINGS[case])
    lora = settings.pop("lora", False)

    def train(folder, stop_after=None, **more):
        config = LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.0, task_type="CAUSAL_LM")
        trainer = make_trainer(
            output_dir=str(tmp_path / folder), max_steps=4, dataset=problems, save_strategy="steps", save_steps=1,
            peft_config=config if lora else None, callbacks=[StopAfter(stop_after)], **(settings | more),
        )  # fmt: skip
        trainer.train(resume_from_checkpoint="latest" if (tmp_path / folder / "checkpoint-1").exists() else None)
        return flat(trainer.model), RunDirectory(tmp_path / folder)

    settings_of_probe = PROBE | {"entropy_placebo": case == "plain"}
    off, off_run = train("off", **{name: DEFAULTS[name] for name in settings if name in DEFAULTS})
    on, on_run = train("on", **settings_of_probe)
    assert torch.equal(off, on)
    for off_row, on_row in zip(without_clocks(off_run.metrics()), without_clocks(on_run.metrics()), strict=True):
        assert off_row.items() <= on_row.items()
    every = settings.get("entropy_probe_every", 1)
    measured = [row["step"] for row in on_run.metrics() if row.get("entropy/delta_measured_stderr", 0) > 0]
    assert measured == [step for step in (1, 2, 3, 4) if step % every == 0]
    train("resumed", stop_after=2, **settings_of_probe)
    resumed, resumed_run = train("resumed", **settings_of_probe)
    assert torch.equal(on, resumed)
    assert without_clocks(resumed_run.metrics()) == without_clocks(on_run.metrics())
    for path in on_run.path.glob("probes/*/*.safetensors"):
        with safe_open(path, "pt") as one, safe_open(resumed_run.path / path.relative_to(on_run.path), "pt") as other:
            assert all(torch.equal(one.get_tensor(name), other.get_tensor(name)) for name in one.keys())  # noqa: SIM118
            assert one.metadata() == other.metadata()


class StopAfter(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop |= state.global_step == self.step


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"num_iterations": 2}, "num_iterations=1 .else steps share completions.*completions='held_out'"),
        ({"entropy_second_order": True}, "entropy_second_order=False .it is predicted before the step"),
        ({"resample_uninformative_groups": True, "steps_per_generation": 2}, "steps_per_generation=1 .else later"),
        (
            {"per_device_train_batch_size": 14, "steps_per_generation": 2},
            r"Set per_device_train_batch_size=4 .else steps share prompt groups",
        ),
        ({"scale_rewards": "batch", "steps_per_generation": 2}, r"scale_rewards='none' .else steps share its"),
        ({"per_device_train_batch_size": 4}, r"at least 2 prompts a step .* has 1.*completions='held_out'"),
        ({"entropy_probe_num_completions": 18}, "is 18: .*multiple of 4 .*Try entropy_probe_num_completions=16"),
        ({"entropy_probe_num_completions": 80}, "at most the 16 completions.*Try entropy_probe_num_completions=16"),
        ({"entropy_prediction": "none", "entropy_attribution": "token"}, "Set entropy_prediction='linear'"),
        ({"mask_truncated_completions": True}, "drops completions by their outcome"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_the_equation_excludes_is_refused_by_name(make_trainer, settings, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(**(PROBE | settings))


def test_dropout_is_refused_since_training_draws_with_it(make_trainer):
    config = LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.1, task_type="CAUSAL_LM")
    with pytest.raises(ValueError, match=r"lora_dropout=0.1: .*draws its own with dropout.*'held_out'"):
        make_trainer(peft_config=config, disable_dropout=False, **PROBE)


def test_a_last_step_without_other_prompts_is_said_to_be_missing(make_trainer, problems, caplog):
    """The dataset has 8 prompts, of which the last step uses 4: too few for a draw of 16 completions."""
    with caplog.at_level("WARNING", logger="trl_entropy"):
        trainer = make_trainer(dataset=problems.select(range(8)), **PROBE)
        trainer.train()
    first, last = RunDirectory(trainer.args.output_dir).metrics()
    assert "entropy/delta_measured" in first and "entropy/delta_measured" not in last
    (said,) = [text for text in caplog.messages if "the last one" in text]
    assert said.startswith("step 2, the last one, has no entropy change: no step follows whose completions could be")


def test_first_groups_are_whole():
    index = torch.tensor([7, 7, 7, 2, 2, 2, 5, 5, 5])
    assert [len(rows_of_first_groups(index, n)) for n in (1, 3, 4, 6, 7, 9, 12)] == [3, 3, 6, 6, 9, 9, 9]
