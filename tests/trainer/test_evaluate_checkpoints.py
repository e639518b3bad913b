"""Evaluation while training goes on: when it runs, that training does not notice, what a failure or a stop does."""

import json
import os
import signal
import threading
import time

import pytest
import torch
from run_rows import without_clocks
from transformers import TrainerCallback

from trl_entropy.evaluation import during_training
from trl_entropy.evaluation.process import CANCELLED
from trl_entropy.runs.directory import RunDirectory
from trl_entropy.trainer.callbacks import RunLogCallback

SAVING = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}


def flat(model):
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def trained(make_trainer, stand_in=None, monkeypatch=None, callbacks=None, **settings):
    """A trainer after training, its run known to be of the embedded task; `stand_in` evaluates."""
    trainer = make_trainer(callbacks=callbacks, **(SAVING | settings))
    log = next(c for c in trainer.callback_handler.callbacks if isinstance(c, RunLogCallback))
    log.settings = {"task": "word_problems", "model_name_or_path": "start"}
    if stand_in is not None:
        monkeypatch.setattr(during_training, "run_job", stand_in(trainer))
    trainer.train()
    return trainer


def evaluator(steps, seconds=0.0, fails=()):
    """Evaluates by noting (checkpoint, training step at the start, at the end), and by drawing random numbers."""

    def of(trainer):
        def run_job(job, timeout, cancel):
            start, deadline = trainer.state.global_step, time.monotonic() + seconds
            while time.monotonic() < deadline:
                if cancel.wait(0.01):
                    return CANCELLED
            steps.append((job.target.step, start, trainer.state.global_step))
            if job.target.step in fails:
                return "exit status 1"
            folder = RunDirectory(trainer.args.output_dir).checkpoint_folder(job.target.step)
            folder.mkdir(parents=True)
            entry = {"value": 0.5, "low": None, "high": None}
            metrics = dict.fromkeys(("pass@1", "greedy_accuracy", "entropy_mean"), entry)
            summary = {"step": job.target.step, "num_prompts": 1, "seconds": 1.0, "metrics": metrics,
                       "settings": {"num_samples": 1}, "fingerprint": ""}  # fmt: skip
            (folder / "summary.json").write_text(json.dumps(summary))
            return None

        return run_job

    return of


@pytest.mark.parametrize("when", ["background", "wait"])
def test_every_checkpoint_is_evaluated_and_training_is_as_without(make_trainer, monkeypatch, when):
    plain = trained(make_trainer)
    steps = []
    with_it = trained(make_trainer, evaluator(steps, 0.3), monkeypatch, evaluate_checkpoints=when)
    assert [step for step, _, _ in steps] == [0, 2, 4]
    if when == "wait":
        assert steps == [(0, 0, 0), (2, 2, 2), (4, 4, 4)]
    assert torch.equal(flat(plain.model), flat(with_it.model))
    rows = [without_clocks(RunDirectory(trainer.args.output_dir).metrics()) for trainer in (plain, with_it)]
    assert rows[0] == rows[1] and len(rows[0]) == 4
    table = (RunDirectory(with_it.args.output_dir).path / "evaluation" / "checkpoints.csv").read_text()
    assert [line.split(",")[0] for line in table.splitlines()] == ["step", "0", "2", "4"]


def test_in_the_background_training_goes_on(make_trainer, monkeypatch):
    steps = []
    trained(make_trainer, evaluator(steps, 1.0), monkeypatch, evaluate_checkpoints="background")
    assert steps[0][0] == 0 and steps[0][2] > steps[0][1]


def test_training_twice_evaluates_each_checkpoint_once_and_leaves_no_thread(make_trainer, monkeypatch):
    steps = []
    settings = {"evaluate_checkpoints": "background", "lr_scheduler_type": "constant"}
    trainer = trained(make_trainer, evaluator(steps), monkeypatch, **settings)
    trainer.args.max_steps = 6
    monkeypatch.setattr(
        during_training, "is_done", lambda run, target, settings: target.step in {s for s, *_ in steps}
    )
    trainer.train(resume_from_checkpoint="latest")
    assert [step for step, _, _ in steps] == [0, 2, 4, 6]
    time.sleep(0.3)
    assert not [thread for thread in threading.enumerate() if "_work" in thread.name]


def test_a_failure_is_said_and_stops_nothing(make_trainer, monkeypatch, caplog):
    steps = []
    trainer = trained(make_trainer, evaluator(steps, fails=[2]), monkeypatch, evaluate_checkpoints="wait")
    assert [step for step, _, _ in steps] == [0, 2, 4] and trainer.state.global_step == 4
    assert "evaluation of step 2 failed: exit status 1" in caplog.text
    assert RunDirectory(trainer.args.output_dir).checkpoint_summary(4) is not None


def test_a_run_that_is_told_to_stop_waits_for_no_evaluation(make_trainer, monkeypatch, caplog):
    class Send(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 2:
                os.kill(os.getpid(), signal.SIGTERM)

    steps, start = [], time.monotonic()
    trainer = trained(make_trainer, evaluator(steps, 60.0), monkeypatch, [Send()], evaluate_checkpoints="background")
    assert trainer.state.global_step == 3 and steps == [] and time.monotonic() - start < 50
    assert "3 evaluations are left; to do them: trl-entropy evaluate --run" in caplog.text


def test_a_run_of_no_known_task_is_refused_at_its_start(make_trainer):
    trainer = make_trainer(**SAVING, evaluate_checkpoints="wait")
    with pytest.raises(ValueError, match="does not say on which task the run was trained"):
        trainer.train()
    assert trainer.state.global_step == 0


@pytest.mark.parametrize("settings, message", [
    ({"evaluate_checkpoints": "always"}, "evaluate_checkpoints is 'always'; use one of none, background, wait"),
    ({"evaluate_checkpoints": "wait"}, "save_strategy='no' saves nothing"),
    ({"evaluate_profile": "slow"}, "evaluate_profile is 'slow'; use one of quick, full"),
])  # fmt: skip
def test_settings_that_cannot_be(make_trainer, settings, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(save_strategy="no", **settings)
