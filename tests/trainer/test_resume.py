"""Interrupted and resumed is uninterrupted, bit for bit: weights and every logged number that is not a clock."""

import copy
import json
import os
import re
import shutil
from collections import deque
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from curriculum_trainer import with_curriculum
from datasets import Dataset
from first_fast import first_fast
from run_rows import without_clocks
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import TrainerCallback

from trl_entropy import DrGRPOTrainer
from trl_entropy.runs import checkpoints
from trl_entropy.runs.checkpoints import CheckpointError
from trl_entropy.runs.directory import RunDirectory

EVERY_PROBE = {
    "entropy_probe": True,
    "entropy_probe_completions": "held_out",
    "entropy_probe_num_completions": 8,
    "entropy_second_order": True,
    "entropy_placebo": True,
    "effective_sample_size_probe": True,
    "optimizer_state_probe": True,
    "kl_every": 2,
}
STEPS = 5


def sparse_reward(completion_ids, **kwargs):
    """Equal in every fifth group of four."""
    return [float(sum(ids) % 3 == 0) for ids in completion_ids]


class StopAfter(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            control.should_training_stop = True


def prompts(num_apples):
    return Dataset.from_dict(
        {"prompt": [f"{name} has {i} apples." for name in ("Ann", "Ben") for i in range(num_apples)]}
    )


@pytest.fixture(scope="module")
def problems():
    return prompts(8)


def flat(model):
    return torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])


def train(make_trainer, folder, stop_after=None, resume=None, lora=False, **settings):
    from peft import LoraConfig

    peft_config = LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.0, task_type="CAUSAL_LM")
    defaults = {"max_steps": STEPS, "save_strategy": "steps", "save_steps": 1, "warmup_steps": 2}
    trainer = make_trainer(
        output_dir=str(folder),
        callbacks=[StopAfter(stop_after)],
        peft_config=peft_config if lora else None,
        resume_from_checkpoint=resume,
        **(defaults | settings),
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


# Each case joins what can be on in one run: what differs names its owner, by the key of a metric or of a state.
CASES = {
    "every probe, schedule, log lines of two steps": {
        **EVERY_PROBE,
        **{"noise_scale_probe": True, "fisher_probe": True, "fisher_num_sequences": 12},
        **{"lr_scheduler_type": "cosine", "logging_steps": 2},
    },
    "adapter, completions, inside a generation window": {
        **{"lora": True, "entropy_probe": True, "entropy_probe_num_completions": 8, "noise_scale_probe": True},
        **{"steps_per_generation": 3, "dataset_factor": 4, "log_completions": True, "num_completions_to_print": 0},
    },
    "two iterations, tokens by chance in micro-batches": {
        **{"num_iterations": 2, "gradient_accumulation_steps": 2},
        **{"token_control": "random", "token_control_scope": "micro_batch", "token_control_fraction": 0.2},
    },
    "second epoch, evaluation": {
        **{"per_device_train_batch_size": 32, "num_generations_eval": 2},
        **{"eval_strategy": "steps", "eval_steps": 2, "eval_on_start": True},
    },
    "rollouts source": {"entropy_probe": True, "entropy_probe_completions": "rollouts"},
    "curriculum in the second epoch": {
        **{"curriculum": "pass_rate", "trainer_class": with_curriculum(pass_reward=0.5, ema=1.0)},
        **{"per_device_train_batch_size": 32},
    },
    "resampling by pass rate, adapter": {
        **{"resample_uninformative_groups": True, "reward_funcs": sparse_reward, "curriculum": "pass_rate"},
        **{"trainer_class": with_curriculum(ema=1.0), "noise_scale_probe": True, "lora": True},
    },
    "resampling inside a generation window": {
        **{"resample_uninformative_groups": True, "reward_funcs": sparse_reward, "max_resample_rounds": 1},
        **{"steps_per_generation": 3, "dataset_factor": 6, "log_completions": True, "num_completions_to_print": 0},
    },
}


def killed_after(straight, step, run):
    """A copy of a run without the checkpoints after `step`; lines and files of later steps are there."""
    later = [f"checkpoint-{number}" for number in range(step + 1, STEPS + 1)]
    shutil.copytree(straight, run, ignore=shutil.ignore_patterns(*later))
    return run


def held_of(run, name):
    """
    What a file of the last checkpoint holds, by its place in it; equal if and only if it is so bit for bit.

    Without clocks, and without the state of Python's own random numbers, which beartype draws from in tests.
    """

    def parts(value, place):
        if isinstance(value, torch.Tensor | np.ndarray):
            return [(place, (str(value.dtype), value.shape, np.asarray(value).tobytes()))]
        if isinstance(value, dict):
            return [part for key, item in value.items() for part in parts(item, f"{place}/{key}")]
        if isinstance(value, list | tuple | deque):
            return [part for number, item in enumerate(value) for part in parts(item, f"{place}/{number}")]
        return [(place, value.hex() if isinstance(value, float) else value)]  # nan is nan

    held = parts(torch.load(run / f"checkpoint-{STEPS}" / name, weights_only=False), name)
    return {place: value for place, value in held if not re.search("time|per_second|/python/", place)}


def files_of(run):
    return {path.relative_to(run) for pattern in ("probes/*/*", "comp*/*") for path in run.glob(pattern)}


@pytest.mark.parametrize("case", first_fast(CASES))
def test_resumed_is_uninterrupted(make_trainer, tmp_path, case):
    settings = dict(CASES[case])
    settings["dataset"] = prompts(8 * settings.pop("dataset_factor", 1))
    if "evaluation" in case:
        settings["eval_dataset"] = settings["dataset"].select(range(4))
    straight = train(make_trainer, tmp_path / "straight", **settings)
    run = killed_after(tmp_path / "straight", 1, tmp_path / "interrupted")
    train(make_trainer, run, stop_after=3, resume="latest", **settings)
    RunDirectory(run).append_metrics(4, {"loss": 1e9})  # killed again, somewhat later than the checkpoint
    resumed = train(make_trainer, run, resume="latest", **settings)  # in the second half
    assert torch.equal(flat(straight.model), flat(resumed.model))
    expected, got = RunDirectory(tmp_path / "straight"), RunDirectory(run)
    assert [start["after_step"] for start in got.starts()] == [0, 1, 3]
    assert without_clocks(got.metrics()) == without_clocks(expected.metrics())
    lines = [json.loads(line) for line in got.metrics_path.read_text().splitlines()]
    steps = [line["step"] for line in lines if "added_later" not in line]  # as what the next step measures of one is
    assert steps == sorted(set(steps)) and steps[-1] >= STEPS - 1
    assert without_clocks(got.evaluation()) == without_clocks(expected.evaluation())
    assert files_of(run) == files_of(expected.path)
    for name in (
        "training_state_0.pt",
        "optimizer.pt",
        "scheduler.pt",
        "rng_state.pth",
    ):  # of which a later step would be made
        held, wanted = held_of(run, name), held_of(expected.path, name)
        assert held.keys() == wanted.keys() and [place for place in held if held[place] != wanted[place]] == []
    if "resampling" in case:
        assert sum(row.get("resampling/num_rounds", 0) for row in got.metrics()) >= 2
    if "second epoch" in case:
        assert got.metrics()[-1]["epoch"] > 2


def test_additional_steps_follow_the_schedule_of_the_longer_run(make_trainer, tmp_path):
    settings = {"lr_scheduler_type": "linear"}
    train(make_trainer, tmp_path / "run", max_steps=3, **settings)
    train(make_trainer, tmp_path / "run", max_steps=3, resume="latest", additional_steps=2, **settings)
    rates = [row["learning_rate"] for row in RunDirectory(tmp_path / "run").metrics()]
    train(make_trainer, tmp_path / "longer", max_steps=5, **settings)
    longer = [row["learning_rate"] for row in RunDirectory(tmp_path / "longer").metrics()]
    assert len(rates) == 5 and rates[3:] == longer[3:]
    with pytest.raises(ValueError, match="additional_steps is 2: it counts steps beyond a checkpoint"):
        train(make_trainer, tmp_path / "other", additional_steps=2)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return tmp_path_factory.mktemp("trained") / "run"


@pytest.fixture
def run(make_trainer, trained, tmp_path):
    """A copy of a run of three steps, each with a checkpoint."""
    if not trained.exists():
        train(make_trainer, trained, max_steps=3)
    return shutil.copytree(trained, tmp_path / "run")


def half_written(path: Path):
    (path / checkpoints.SEAL).unlink()


def truncated(path: Path):
    with open(path / "optimizer.pt", "r+b") as file:
        file.truncate(100)


def damaged(path: Path):
    file = path / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def missing(path: Path):
    (path / "training_state_0.pt").unlink()


def zeroed(path: Path):
    (path / checkpoints.SEAL).write_bytes(bytes(500))


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (half_written, "its writing was cut off"),
        (truncated, "optimizer.pt has 100 bytes"),
        (damaged, "model.safetensors is damaged"),
        (missing, "training_state_0.pt is missing"),
        (zeroed, "checkpoint_complete.json is damaged"),
    ],
)
def test_a_broken_checkpoint_is_named_and_passed_over(make_trainer, run, harm, message, caplog):
    caplog.set_level("INFO", "trl_entropy")
    harm(run / "checkpoint-3")
    with pytest.raises(CheckpointError, match=message):
        train(make_trainer, run, max_steps=3, resume=str(run / "checkpoint-3"))
    trainer = train(make_trainer, run, max_steps=3, resume="latest")
    assert f"passing over a checkpoint: {run / 'checkpoint-3'}" in caplog.text and message in caplog.text
    assert f"going on from {run / 'checkpoint-2'}, after step 2" in caplog.messages
    assert trainer.state.global_step == 3
    checkpoints.check_files(run / "checkpoint-3")  # written anew


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "seed was 42 and is 1"),
        ({"learning_rate": 5e-4}, "learning_rate was 0.001 and is 0.0005"),
        ({"token_control": "random"}, "token_control was 'none' and is 'random'"),
        ({"reward_funcs": sparse_reward}, r"reward_funcs was \['.*'\] and is \['sparse_reward'\]"),
        ({"max_steps": 9}, "max_steps was 3 and is 9.*use additional_steps"),
        ({"dataset": Dataset.from_dict({"prompt": ["other"] * 8})}, "data was"),
        ({"lora": True}, "model was"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "says",
)
def test_another_run_is_refused_with_what_differs(make_trainer, run, change, message):
    with pytest.raises(CheckpointError, match=message):
        train(make_trainer, run, resume="latest", **({"max_steps": 3} | change))
    assert len(RunDirectory(run).metrics()) == 3  # nothing is lost


def test_latest_without_a_checkpoint_deletes_nothing(make_trainer, tmp_path, caplog):
    RunDirectory(tmp_path / "run").append_metrics(1, {"loss": 5.0})  # killed before its first checkpoint
    with pytest.raises(CheckpointError, match=r"no complete checkpoint, but .*'latest_or_new'"):
        train(make_trainer, tmp_path / "run", max_steps=1, resume="latest")
    assert RunDirectory(tmp_path / "run").metrics() == [{"step": 1, "loss": 5.0}]
    trainer = train(make_trainer, tmp_path / "run", max_steps=1, resume="latest_or_new")
    assert trainer.state.global_step == 1 and "no complete checkpoint: starting from the beginning" in caplog.text
    (row,) = RunDirectory(tmp_path / "run").metrics()
    assert row["step"] == 1 and row["loss"] != 5.0
    aside = RunDirectory(tmp_path / "run" / "set_aside" / "after_step_000000_1")
    assert aside.metrics() == [{"step": 1, "loss": 5.0}]


def test_the_newest_checkpoint_is_that_of_the_branch_that_goes_on(make_trainer, run):
    """Resumed from an older checkpoint and killed: `latest` must not take the branch that was left."""
    (left,) = [row["entropy/policy"] for row in RunDirectory(run).metrics() if row["step"] == 3]
    train(make_trainer, run, 2, str(run / "checkpoint-1"), max_steps=3)
    assert checkpoints.newest_complete(run) == run / "checkpoint-2"
    checkpoints.check_files(run / "set_aside" / "after_step_000001_1" / "checkpoint-3")
    train(make_trainer, run, None, "latest", max_steps=3)
    assert [row["step"] for row in RunDirectory(run).metrics()] == [1, 2, 3]
    assert RunDirectory(run).metrics()[-1]["entropy/policy"] == left  # the same branch again, bit for bit


def test_a_change_that_is_asked_for_is_made_and_written_down(make_trainer, run):
    change = {"learning_rate": 5e-4, "weight_decay": 0.1, "adam_beta1": 0.8, "temperature": 0.5}
    trainer = train(
        make_trainer, run, None, str(run / "checkpoint-2"), max_steps=3, **change, resume_allow_changes=list(change)
    )
    assert RunDirectory(run).metrics()[-1]["learning_rate"] == 5e-4
    assert [group["weight_decay"] for group in trainer.optimizer.param_groups] == [0.1, 0.0]
    assert [group["betas"] for group in trainer.optimizer.param_groups] == [(0.8, 0.999)] * 2
    began, resumed = RunDirectory(run).starts()
    assert (began["after_step"], began["resumed_from"], began["changed"]) == (0, None, {})
    assert (resumed["after_step"], resumed["resumed_from"]) == (2, "checkpoint-2")
    assert resumed["changed"] == {
        "learning_rate": [0.001, 0.0005],
        "weight_decay": [0.0, 0.1],
        "adam_beta1": [0.9, 0.8],
        "temperature": [1.0, 0.5],
    }
    assert began["command"] and began["packages"]["trl"]  # of the first start too


@pytest.mark.parametrize("lora", [True, False])
def test_vllm_with_an_adapter_says_that_resuming_rounds(make_trainer, tmp_path, caplog, monkeypatch, lora):
    """`tests/real_vllm` resumes such a run."""
    from peft import LoraConfig

    adapter = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM") if lora else None
    trainer = make_trainer(output_dir=str(tmp_path), peft_config=adapter)
    trainer.args.use_vllm, trainer._allowed_changes = True, {}
    monkeypatch.setattr(checkpoints, "read_seal", lambda path: {"step": 1})
    trainer._prepare_run(tmp_path / "checkpoint-1", resumes=False)
    assert ("use_vllm with an adapter: the resumed run is not bit for bit" in caplog.text) == lora


def test_changes_that_are_allowed_where_nothing_is_resumed_are_warned_of(make_trainer, tmp_path, caplog):
    said = "resume_allow_changes is ['seed'], but nothing is resumed: set resume_from_checkpoint with it"
    for resume, times in ((None, 1), ("latest", 0)):
        caplog.clear()
        folder = tmp_path / str(resume)
        train(make_trainer, folder, resume=resume, resume_allow_changes=["seed"], max_steps=1, save_strategy="no")
        assert caplog.messages.count(said) == times


@pytest.mark.parametrize("change", [{"learning_rate": 5e-4}, {"temperature": 0.5}], ids=str)
def test_a_schedule_that_follows_no_step_keeps_what_was_not_changed(make_trainer, problems, tmp_path, change):
    settings = {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps", "eval_steps": 9, "max_steps": 2}
    settings |= {"eval_dataset": problems.select(range(4)), "num_generations_eval": 1, "warmup_steps": 0}
    train(make_trainer, tmp_path / "run", **settings)
    path = str(tmp_path / "run" / "checkpoint-1")
    trainer = train(make_trainer, tmp_path / "run", None, path, **settings | change, resume_allow_changes=list(change))
    assert {group["lr"] for group in trainer.optimizer.param_groups} == {change.get("learning_rate", 1e-3)}


def test_no_file_of_a_run_holds_a_secret(make_trainer, tmp_path, monkeypatch):
    secrets = [f"hf_{letter * 30}" for letter in "abcd"]
    monkeypatch.setattr("sys.argv", ["train.py", "--hub_token", secrets[0], f"--hub_token={secrets[1]}"])
    monkeypatch.setenv("HF_HUB_TOKEN", secrets[2])
    init = {"model_init_kwargs": {"token": secrets[3]}}
    trainer = train(make_trainer, tmp_path / "run", max_steps=1, hub_token=secrets[0], report_to="tensorboard", **init)
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert any(path.name == "training_args.bin" for path in files)
    assert [path for path in files if any(secret.encode() in path.read_bytes() for secret in secrets)] == []
    assert trainer.args.hub_token == secrets[0] == copy.deepcopy(trainer.args).hub_token


def test_retention_keeps_a_complete_checkpoint_whenever_it_is_cut_off(make_trainer, tmp_path, monkeypatch):
    left = []
    monkeypatch.setattr("trl_entropy.runs.checkpoints.seal", look(checkpoints.seal, tmp_path, left))
    train(make_trainer, tmp_path / "run", max_steps=4, save_total_limit=1)
    assert left == [None, "checkpoint-1", "checkpoint-2", "checkpoint-3"]  # just before each seal
    assert [path.name for path in checkpoints.checkpoints_of(tmp_path / "run")] == ["checkpoint-4"]


@pytest.mark.parametrize(
    ("limit", "best", "in_use", "left"),
    [
        (None, None, (), [12, 10, 9, 8]),
        (1, None, (), [12]),
        (2, None, (), [12, 10]),
        (3, None, (), [12, 10, 9]),
        (9, None, (), [12, 10, 9, 8]),
        (1, 8, (), [12, 8]),
        (2, 8, (), [12, 8]),
        (3, 8, (), [12, 10, 8]),
        (2, 12, (), [12, 10]),
        (1, None, (8, 10), [12, 10, 8]),
        (1, None, (8, 9, 10), [12, 10, 9, 8]),  # the newest stays where all others are in use
        (2, 9, (8,), [12, 9, 8]),
    ],
)
def test_the_newest_the_best_and_those_in_use_are_kept(tmp_path, limit, best, in_use, left):
    for step in (8, 9, 10, 12):
        (tmp_path / f"checkpoint-{step}").mkdir()
    trainer = SimpleNamespace(
        args=SimpleNamespace(save_total_limit=limit, should_save=True),
        state=SimpleNamespace(best_model_checkpoint=best and str(tmp_path / f"checkpoint-{best}")),
        checkpoints_in_use=lambda: set(in_use),
    )
    DrGRPOTrainer._delete_old_checkpoints(trainer, tmp_path)
    assert [checkpoints.step_of(path) for path in checkpoints.checkpoints_of(tmp_path)] == left


def test_checkpoints_without_an_optimizer_are_deleted_too(make_trainer, tmp_path):
    train(make_trainer, tmp_path / "run", max_steps=4, save_total_limit=2, save_only_model=True)
    assert [path.name for path in checkpoints.checkpoints_of(tmp_path / "run")] == ["checkpoint-4", "checkpoint-3"]


class Sized:
    """No tensor, number or text."""


@pytest.mark.parametrize("logged", [np.float64(0.5), np.int64(3), Sized()], ids=["float64", "int64", "object"])
def test_a_sealed_checkpoint_can_be_loaded_whatever_a_reward_logs(make_trainer, tmp_path, logged):
    """A checkpoint inside a generation's window holds what rewards have logged of its completions."""

    def logging_reward(completion_ids, log_extra, **kwargs):
        log_extra("size", [logged] * len(completion_ids))
        return [float(sum(ids) % 2) for ids in completion_ids]

    settings = {"reward_funcs": logging_reward, "steps_per_generation": 2, "max_steps": 2}
    if isinstance(logged, Sized):
        with pytest.raises(
            CheckpointError, match=r"holds an object \(test_resume.Sized\) that is no tensor, number or text"
        ):
            train(make_trainer, tmp_path / "run", stop_after=1, **settings)
        assert checkpoints.newest_complete(tmp_path / "run") is None
        return
    train(make_trainer, tmp_path / "run", stop_after=1, **settings)
    assert train(make_trainer, tmp_path / "run", resume="latest", **settings).state.global_step == 2


def look(seal, tmp_path, left):
    def sealing(path, contract):
        whole = checkpoints.newest_complete(tmp_path / "run")
        left.append(whole.name if whole else None)
        seal(path, contract)
        os.utime(path, (0, 10**9 - 1000 * contract["step"]))  # a clock that is set back again and again

    return sealing


def test_a_disk_that_is_full_gives_one_clear_error(make_trainer, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    train(make_trainer, tmp_path / "run", max_steps=2)
    monkeypatch.setattr("trl_entropy.trainer.training_state.save", full)
    shutil.rmtree(tmp_path / "run" / "checkpoint-2")
    with pytest.raises(CheckpointError, match=r"No space left.*Make room.*resume from .*checkpoint-1"):
        train(make_trainer, tmp_path / "run", max_steps=2, resume="latest")
    checkpoints.check_files(tmp_path / "run" / "checkpoint-1")


def test_another_error_while_saving_does_not_ask_for_room(make_trainer, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("Column 'prompt' doesn't exist.")

    monkeypatch.setattr("trl_entropy.trainer.training_state.save", fail)
    with pytest.raises(
        CheckpointError,
        match=r"doesn't exist\. Remove the cause; then begin anew with resume_from_checkpoint=latest_or_new",
    ) as error:
        train(make_trainer, tmp_path / "run", max_steps=1)
    assert "room" not in str(error.value) and ".." not in str(error.value)


def test_tensorboard_shows_each_step_once(make_trainer, tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "tensorboard"))
    for stop_after in (3, None):
        if stop_after is None:
            shutil.rmtree(tmp_path / "run" / "checkpoint-3")  # so that step 3 is made twice
        resume = None if stop_after else "latest"
        train(make_trainer, tmp_path / "run", stop_after, resume, max_steps=5, report_to="tensorboard")
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/reward")] == [1, 2, 3, 4, 5]
