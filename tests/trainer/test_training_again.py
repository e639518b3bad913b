"""A run directory has one run: another training is refused, a finished one is left alone, signals go back."""

import math
import os
import signal
from pathlib import Path

import pytest
import torch
from transformers import TrainerCallback

from trl_entropy.runs import checkpoints
from trl_entropy.runs.directory import RunDirectory
from trl_entropy.runs.lock import LOCK, RunIsLocked, locked

SAVING = {"save_strategy": "steps", "save_steps": 1}
USED = r"already holds a run of 2 steps\. Choose another output_dir, move it away, or continue it"


def flat(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def contents(run: Path) -> dict:
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in sorted(run.rglob("*")) if path.is_file()}


@pytest.fixture
def finished(make_trainer, tmp_path):
    """A run of two steps that has ended."""
    trainer = make_trainer(output_dir=str(tmp_path / "run"), **SAVING)
    trainer.train()
    return trainer


def test_a_second_training_into_a_run_directory_is_refused(make_trainer, finished):
    run = Path(finished.args.output_dir)
    before = contents(run)
    for again in (finished, make_trainer(output_dir=str(run), **SAVING)):  # the same trainer, and another
        with pytest.raises(ValueError, match=USED):
            again.train()
    assert contents(run) == before


def test_a_training_that_began_at_the_same_time_is_refused_at_its_first_step(make_trainer, tmp_path):
    class Overtakes(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            for step in (1, 2):
                RunDirectory(args.output_dir).append_metrics(step, {"loss": 1.0})

    trainer = make_trainer(output_dir=str(tmp_path / "run"), callbacks=[Overtakes()])
    with pytest.raises(ValueError, match=USED):
        trainer.train()
    assert [row["loss"] for row in RunDirectory(tmp_path / "run").metrics()] == [1.0, 1.0]


@pytest.mark.parametrize("resume", ["latest", True, "checkpoint-2"])
def test_resuming_a_finished_run_trains_nothing_and_writes_nothing(make_trainer, finished, resume, caplog):
    run = Path(finished.args.output_dir)
    before, path = contents(run), str(run / resume) if resume == "checkpoint-2" else resume
    trainer = make_trainer(output_dir=str(run), **SAVING)
    assert not torch.equal(flat(trainer.model), flat(finished.model))
    output = trainer.train(resume_from_checkpoint=path)
    assert output.global_step == trainer.state.global_step == 2 and math.isnan(output.training_loss)
    assert "is already finished: checkpoint-2 is its last step" in caplog.text
    assert contents(run) == before
    assert torch.equal(flat(trainer.model), flat(finished.model))  # what save_model() writes after train()
    trainer.train(resume_from_checkpoint=path)
    assert contents(run) == before


def test_more_steps_are_trained_where_the_schedule_allows_it(make_trainer, tmp_path):
    settings = {"output_dir": str(tmp_path / "run"), "lr_scheduler_type": "constant", **SAVING}
    for max_steps, resume in ((2, None), (2, "latest"), (3, "latest")):
        make_trainer(**settings, max_steps=max_steps).train(resume_from_checkpoint=resume)
        assert [row["step"] for row in RunDirectory(tmp_path / "run").metrics()] == list(range(1, max_steps + 1))


@pytest.mark.parametrize("epochs, steps", [(1, 2), (1.5, 3), (0.3, 1), (1 / 3, 1)])
def test_a_run_of_epochs_is_finished_after_its_last_step(make_trainer, tmp_path, epochs, steps):
    settings = {"max_steps": -1, "num_train_epochs": epochs, "output_dir": str(tmp_path / "run"), **SAVING}
    trainer = make_trainer(**settings)
    trainer.train()
    assert trainer.state.global_step == steps
    for step in range(1, steps + 1):
        path = tmp_path / "run" / f"checkpoint-{step}"
        assert checkpoints.is_finished(path, -1, epochs) == (step == steps)
        assert not checkpoints.is_finished(path, -1, epochs + 1)


# ---- signals


class Raises(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        raise RuntimeError("out of luck")


class Terminates(TrainerCallback):
    def __init__(self):
        self.left = 1

    def on_step_begin(self, args, state, control, **kwargs):
        if self.left:
            self.left -= 1
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("previous", [signal.SIG_DFL, signal.SIG_IGN, lambda *_: None], ids=["default", "off", "own"])
def test_an_exception_gives_sigterm_back(make_trainer, previous):
    before = signal.signal(signal.SIGTERM, previous)
    try:
        with pytest.raises(RuntimeError, match="out of luck"):
            make_trainer(callbacks=[Raises()]).train()
        assert signal.getsignal(signal.SIGTERM) is previous
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_training_after_one_that_was_stopped_makes_all_its_steps(make_trainer):
    trainer = make_trainer(callbacks=[Terminates()], max_steps=4, **SAVING)
    trainer.train()
    assert trainer.state.global_step == 1
    trainer.train(resume_from_checkpoint="latest")
    assert trainer.state.global_step == 4
    assert [row["step"] for row in RunDirectory(trainer.args.output_dir).metrics()] == [1, 2, 3, 4]


@pytest.mark.parametrize("resume", [None, "latest", "checkpoint-1"])
def test_two_processes_cannot_train_in_one_run_directory_at_once(make_trainer, finished, resume):
    run = Path(finished.args.output_dir)
    trainer = make_trainer(output_dir=str(run), max_steps=3, lr_scheduler_type="constant", **SAVING)
    with locked(run):  # by another open file, as by another process
        before = contents(run)
        with pytest.raises(RunIsLocked, match=f"is being trained already, by process {os.getpid()} on"):
            trainer.train(resume_from_checkpoint=str(run / resume) if resume == "checkpoint-1" else resume)
        assert contents(run) == before


def test_the_run_directory_is_locked_as_long_as_training_lasts(make_trainer, tmp_path):
    class Looks(TrainerCallback):
        found = ()

        def on_step_end(self, args, state, control, **kwargs):
            with pytest.raises(RunIsLocked), locked(tmp_path / "run"):
                pytest.fail("entered")
            self.found += (state.global_step,)

    looks = Looks()
    make_trainer(output_dir=str(tmp_path / "run"), callbacks=[looks]).train()
    assert looks.found == (1, 2) and not (tmp_path / "run" / LOCK).exists()


def test_what_killed_processes_have_left_unfinished_is_removed(make_trainer, finished):
    run = Path(finished.args.output_dir)
    folders = {step: run / "evaluation" / f".step_{step:06d}.partial" for step in (0, 1, 2, 7)}
    for folder in folders.values():
        folder.mkdir(parents=True)
    unfinished = [run / "probes" / "entropy" / name for name in (".tmpAbC123", ".step_000002.safetensors.tmp")]
    for path in unfinished:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"half")
    make_trainer(output_dir=str(run), **SAVING).train(resume_from_checkpoint=str(run / "checkpoint-1"))
    assert not any(path.exists() for path in unfinished)
    assert [step for step, folder in folders.items() if folder.exists()] == [0, 1]
