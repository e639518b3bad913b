"""The run log has a line for each step and loses no nan; trackers get numbers only, once every `logging_steps`."""

import json
import math

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import TrainerCallback
from transformers.integrations import WandbCallback
from trl import GRPOConfig, GRPOTrainer

from trl_entropy import Probe
from trl_entropy.runs.directory import RunDirectory


class Grows(Probe):
    """Step s logs s of everything, and twice s as the error of `my/mean`."""

    def on_rollouts(self, args, state, control, *, metrics, **kwargs):
        step = float(state.global_step + 1)
        metrics |= {"my/mean": step, "my/mean_stderr": 2 * step, "entropy/integral_measured": step}
        metrics |= {"ratio/max": step, "completions/min_length": step}


class Tracker(WandbCallback):
    """Keeps what it is given by step, in place of a tracker of `report_to`."""

    def __init__(self):
        self.lines = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.lines.append((state.global_step, dict(logs)))

    def ignore(self, *args, **kwargs):
        pass

    on_train_begin = on_train_end = on_save = on_predict = ignore


def without_clocks(row):
    return {key: value for key, value in row.items() if "time" not in key}


def lines(trainer):
    return [json.loads(line) for line in RunDirectory(trainer.args.output_dir).metrics_path.read_text().splitlines()]


def trained(make_trainer, *callbacks, **settings):
    tracker = Tracker()
    trainer = make_trainer(callbacks=[tracker, *callbacks], **settings)
    trainer.train()
    return trainer, tracker


@pytest.mark.parametrize("logging, at", [
    ({"logging_steps": 1}, [1, 2, 3, 4, 5]),
    ({"logging_steps": 2}, [2, 4]),
    ({"logging_strategy": "epoch", "per_device_train_batch_size": 32, "max_steps": -1, "num_train_epochs": 5},
     [1, 2, 3, 4, 5]),
    ({"logging_strategy": "no"}, []),
])  # fmt: skip
def test_every_step_has_its_line_however_often_trackers_get_one(make_trainer, logging, at):
    trainer, tracker = trained(make_trainer, Grows(), **({"max_steps": 5} | logging))
    rows = lines(trainer)
    assert [row["step"] for row in rows] == [row["my/mean"] for row in rows] == [1, 2, 3, 4, 5]
    assert all({"loss", "grad_norm", "learning_rate", "reward", "epoch", "step_time"} <= row.keys() for row in rows)
    assert [step for step, logs in tracker.lines if "loss" in logs] == at


def test_a_line_of_several_steps_reduces_each_key_in_its_own_way(make_trainer):
    trainer, tracker = trained(make_trainer, Grows(), max_steps=6, logging_steps=3)
    rows = lines(trainer)
    for (step, logs), three in zip(tracker.lines, (rows[:3], rows[3:]), strict=False):
        last = float(step)
        assert logs["my/mean"] == last - 1
        expected = math.sqrt(sum((2 * s) ** 2 for s in (last - 2, last - 1, last))) / 3
        assert logs["my/mean_stderr"] == pytest.approx(expected, rel=1e-14)
        assert logs["entropy/integral_measured"] == last
        assert logs["ratio/max"] == last
        assert logs["completions/min_length"] == min(row["completions/min_length"] for row in three)
        for key in ("reward", "loss", "entropy/policy"):
            assert logs[key] == pytest.approx(sum(row[key] for row in three) / 3, rel=1e-5), key
        for key in ("learning_rate", "grad_norm", "num_tokens", "epoch"):
            assert logs[key] == three[-1][key], key


def test_a_step_of_several_micro_batches_has_the_sum_of_their_losses(make_trainer):
    """In the run log, by which transformers' own log line is the witness."""
    accumulation = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2}
    trainer, tracker = trained(make_trainer, max_steps=2, logging_steps=1, **accumulation)
    witnessed = [logs["loss"] for _, logs in tracker.lines if "loss" in logs]
    assert [row["loss"] for row in lines(trainer)] == pytest.approx(witnessed, rel=1e-5) and all(witnessed)


def test_the_line_of_a_step_is_the_same_however_often_trackers_get_one(make_trainer):
    settings = {"max_steps": 4, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 2}
    each, rarely = (trained(make_trainer, logging_steps=n, **settings)[0] for n in (1, 3))
    for one, other in zip(lines(each), lines(rarely), strict=True):
        assert without_clocks(one) == without_clocks(other)


def test_a_line_of_several_steps_has_what_trl_logs_of_means(make_trainer):
    """Both steps train on one micro-batch of the same completions, whose rows stand in another order."""
    settings = {"max_steps": 2, "logging_steps": 2, "num_iterations": 2}
    _, tracker = trained(make_trainer, **settings)
    plain = Tracker()
    theirs = make_trainer(
        GRPOTrainer, GRPOConfig, callbacks=[plain], loss_type="dr_grpo", scale_rewards="none", beta=0.0, top_k=0,
        **settings,
    )  # fmt: skip
    theirs.train()
    (_, logs), (_, expected) = tracker.lines[0], plain.lines[0]
    assert expected.keys() <= logs.keys()
    for key in ("reward", "entropy", "completions/mean_length", "frac_reward_zero_std"):
        assert logs[key] == pytest.approx(expected[key], rel=1e-4), key


def test_resuming_inside_a_log_line_loses_nothing(make_trainer, tmp_path):
    settings = {"max_steps": 4, "logging_steps": 4, "save_strategy": "steps", "save_steps": 1}
    straight, expected = trained(make_trainer, Grows(), **settings, output_dir=str(tmp_path / "straight"))

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 2

    trained(make_trainer, Grows(), Stop(), **settings, output_dir=str(tmp_path / "half"))
    tracker = Tracker()
    resumed = make_trainer(callbacks=[tracker, Grows()], **settings, output_dir=str(tmp_path / "half"))
    resumed.train(resume_from_checkpoint="latest")
    (at, logs), (expected_at, expected_logs) = tracker.lines[0], expected.lines[0]
    assert at == expected_at == 4 and without_clocks(logs) == without_clocks(expected_logs)
    assert [without_clocks(row) for row in lines(resumed)] == [without_clocks(row) for row in lines(straight)]


# ---- nan and infinities


class NotFinite(Probe):
    def on_rollouts(self, args, state, control, *, metrics, **kwargs):
        metrics |= {"my/upper": math.inf, "my/lower": -math.inf, "my/undefined": math.nan, "my/number": 1.0}


class Late(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 1:
            self.trainer.record_metrics({"late/undefined": math.nan, "late/number": 2.0}, step=1)


class Everything(TrainerCallback):
    """A callback of the user's own that is no tracker: it gets what TRL gives it."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs = getattr(self, "logs", logs)


def test_trackers_get_numbers_only_and_the_run_log_gets_all(make_trainer, tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "tensorboard"))
    everything, late, tracker = Everything(), Late(), Tracker()
    trainer = make_trainer(callbacks=[tracker, NotFinite(), everything, late], report_to="tensorboard")
    late.trainer = trainer
    trainer.train()
    shown = [dict(logs) for _, logs in tracker.lines]
    assert shown[0]["my/number"] == 1.0
    assert not {"my/upper", "my/lower", "my/undefined"} & {key for logs in shown for key in logs}
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert {"train/my/number", "train/late/number"} <= set(events.Tags()["scalars"])
    for tag in events.Tags()["scalars"]:
        assert all(math.isfinite(event.value) for event in events.Scalars(tag)), tag
    assert {"train/my/upper", "train/my/undefined", "train/late/undefined"} & set(events.Tags()["scalars"]) == set()
    assert everything.logs["my/upper"] == math.inf and everything.logs["my/undefined"] is None
    row = lines(trainer)[0]
    assert [row[f"my/{name}"] for name in ("upper", "lower", "undefined")] == [None] * 3
    assert row["not_finite"] == {"my/upper": "inf", "my/lower": "-inf", "my/undefined": "nan"}


@pytest.mark.parametrize("nothing", [None, math.nan])
def test_no_reward_at_all_is_said_once_and_named_in_every_line(make_trainer, caplog, nothing):
    def silent(completions, **kwargs):
        return [nothing] * len(completions)

    trainer, tracker = trained(make_trainer, reward_funcs=[silent], max_steps=2, logging_steps=1)
    said = [message for message in caplog.messages if "no reward arrived" in message]
    assert len(said) == 1 and said[0].startswith("step 1: ") and "silent" in said[0] and "16" in said[0]
    for row in lines(trainer):
        for key in ("reward", "reward_std", "rewards/silent/mean"):
            assert row[key] is None and row["not_finite"][key] == "nan"
    assert not any("reward" in logs for _, logs in tracker.lines)


def test_some_rewards_are_no_reason_to_warn(make_trainer, caplog):
    def sometimes(completion_ids, **kwargs):
        return [float(len(ids)) if row % 2 else None for row, ids in enumerate(completion_ids)]

    trainer, _ = trained(make_trainer, reward_funcs=[sometimes], max_steps=1)
    assert "no reward arrived" not in caplog.text and lines(trainer)[0]["reward"] > 0


def test_a_nan_of_an_evaluation_is_kept_too(make_trainer, problems):
    def silent(completions, **kwargs):
        return [math.nan if not trainer.model.training else 1.0] * len(completions)

    tracker = Tracker()
    trainer = make_trainer(
        callbacks=[tracker], reward_funcs=[silent], eval_dataset=problems.select(range(4)), eval_strategy="steps",
        eval_steps=1, max_steps=1, num_generations_eval=2, per_device_eval_batch_size=8,
    )  # fmt: skip
    trainer.train()
    (row,) = RunDirectory(trainer.args.output_dir).evaluation()
    assert math.isnan(row["reward"]) and math.isfinite(row["entropy"])
    (shown,) = (logs for _, logs in tracker.lines if "eval_runtime" in logs)
    assert "eval_reward" not in shown and math.isfinite(shown["eval_entropy"])


def test_evaluation_sets_do_not_hide_one_another(make_trainer, problems, tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "tensorboard"))
    sets = {"a": problems.select(range(4)), "a_b": problems.select(range(4, 8))}
    trainer = make_trainer(
        eval_dataset=sets, eval_strategy="steps", eval_steps=1, max_steps=1, num_generations_eval=2,
        per_device_eval_batch_size=8, report_to="tensorboard", metric_for_best_model="eval_a_b_reward",
        load_best_model_at_end=True, save_strategy="steps", save_steps=1,
    )  # fmt: skip
    trainer.train()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    run = RunDirectory(trainer.args.output_dir)
    for row in run.evaluation():
        name = row["dataset"]
        (logged,) = events.Scalars(f"eval/{name}_reward")
        assert logged.value == pytest.approx(row["reward"], rel=1e-6)
    assert "eval/reward" not in events.Tags()["scalars"]
    assert trainer.state.best_metric == pytest.approx(run.evaluation()[1]["reward"])


def test_a_log_call_of_the_users_own_takes_nothing_from_the_steps_line(make_trainer):
    class Calls(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            trainer.log({"mine": 1.0})

    tracker = Tracker()
    trainer = make_trainer(callbacks=[tracker, Calls()], max_steps=2)
    trainer.train()
    assert [row["step"] for row in lines(trainer)] == [1, 2] and all("reward" in row for row in lines(trainer))
    assert [logs["mine"] for _, logs in tracker.lines if "mine" in logs] == [1.0, 1.0]


def test_what_a_subclass_adds_to_a_log_line_is_in_the_run_log(make_trainer):
    from trl_entropy import DrGRPOTrainer

    class Adds(DrGRPOTrainer):
        def log(self, logs, start_time=None):
            logs["added"] = torch.tensor(2.0).item()
            super().log(logs, start_time)

    trainer = make_trainer(Adds, max_steps=1)
    trainer.train()
    assert lines(trainer)[0]["added"] == 2.0
