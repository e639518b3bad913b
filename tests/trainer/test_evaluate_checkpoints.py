"""Evaluation while training goes on: when it runs, that training does not notice, what a failure or a stop does."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from run_rows import without_clocks
from transformers import TrainerCallback

from trl_entropy.evaluation import during_training, process
from trl_entropy.evaluation.plan import Target
from trl_entropy.evaluation.process import CANCELLED
from trl_entropy.runs.checkpoints import checkpoints_of
from trl_entropy.runs.counted import counted
from trl_entropy.runs.directory import CheckpointSummary, RunDirectory
from trl_entropy.trainer.callbacks import RunLogCallback

SAVING = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}


def flat(model):
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def trained(make_trainer, stand_in=None, monkeypatch=None, callbacks=None, task=None, **settings):
    """A trainer after training, its run known to be of the embedded task; `stand_in` evaluates."""
    trainer = make_trainer(callbacks=callbacks, **(SAVING | settings))
    log = next(c for c in trainer.callback_handler.callbacks if isinstance(c, RunLogCallback))
    log.settings = {"task": "word_problems", "model_name_or_path": "start"} | (task or {})
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
            summary = dict.fromkeys(CheckpointSummary.__annotations__, "") | {
                "step": job.target.step, "num_prompts": 1, "seconds": 1.0, "metrics": metrics,
                "settings": asdict(job.settings), "fingerprint": job.target.fingerprint(),
            }  # fmt: skip
            (folder / "summary.json").write_text(json.dumps(summary))
            return None

        return run_job

    return of


@pytest.mark.parametrize("when", ["background", "wait"])
def test_every_checkpoint_is_evaluated_and_training_is_as_without(make_trainer, monkeypatch, when):
    plain = trained(make_trainer)
    steps, given_back = [], []
    monkeypatch.setattr(during_training, "clear_device_cache", lambda: given_back.append(len(steps)))
    with_it = trained(make_trainer, evaluator(steps, 0.3), monkeypatch, evaluate_checkpoints=when)
    assert [step for step, _, _ in steps] == [0, 2, 4]
    assert given_back == [0, 1, 2]  # device memory, before each evaluation begins
    if when == "wait":
        assert steps == [(0, 0, 0), (2, 2, 2), (4, 4, 4)]
    assert torch.equal(flat(plain.model), flat(with_it.model))
    rows = [without_clocks(RunDirectory(trainer.args.output_dir).metrics()) for trainer in (plain, with_it)]
    assert rows[0] == rows[1] and len(rows[0]) == 4
    table = (RunDirectory(with_it.args.output_dir).path / "evaluation" / "checkpoints.csv").read_text()
    assert [line.split(",")[0] for line in table.splitlines()] == ["step", "0", "2", "4"]


def until(condition, cancel=None, seconds=60.0):
    """Waits for the condition; whether it came true before `cancel` was set."""
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        if cancel is not None and cancel.is_set():
            return False
        time.sleep(0.01)
    return condition()


def test_in_the_background_training_goes_on(make_trainer, monkeypatch):
    """The first evaluation ends only when training has made all its steps: it would never end if training waited."""
    waited = []

    def stand_in(trainer):
        def run_job(job, timeout, cancel):
            waited.append(until(lambda: trainer.state.global_step == 4))
            return "not evaluated"

        return run_job

    trained(make_trainer, stand_in, monkeypatch, evaluate_checkpoints="background")
    assert waited == [True, True, True]


def test_training_twice_evaluates_each_checkpoint_once_and_leaves_no_thread(make_trainer, monkeypatch):
    steps = []
    settings = {"evaluate_checkpoints": "background", "lr_scheduler_type": "constant"}
    trainer = trained(make_trainer, evaluator(steps), monkeypatch, **settings)
    trainer.args.max_steps = 6
    trainer.train(resume_from_checkpoint="latest")
    assert [step for step, _, _ in steps] == [0, 2, 4, 6]
    assert evaluation_threads() == []


def evaluation_threads():
    return [thread for thread in threading.enumerate() if thread.name == "evaluation"]


def test_a_failure_is_said_and_stops_nothing(make_trainer, monkeypatch, caplog):
    steps = []
    trainer = trained(make_trainer, evaluator(steps, fails=[2]), monkeypatch, evaluate_checkpoints="wait")
    assert [step for step, _, _ in steps] == [0, 2, 4] and trainer.state.global_step == 4
    assert "evaluation of step 2 failed: exit status 1" in caplog.text
    assert RunDirectory(trainer.args.output_dir).checkpoint_summary(4) is not None


class SendSigterm(TrainerCallback):
    """As Slurm does when the time of the job is over: before a step, or before training ends."""

    def __init__(self, before_step=None):
        self.before_step = before_step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.before_step:
            os.kill(os.getpid(), signal.SIGTERM)

    def on_step_end(self, args, state, control, **kwargs):
        if self.before_step is None and state.global_step == 4:
            os.kill(os.getpid(), signal.SIGTERM)


def family(pids, then):
    """A worker's code: it starts a process that ignores SIGTERM, and leaves the numbers of both."""
    child = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); time.sleep(300)"
    return (
        "import os, subprocess, sys, time\n"
        f"child = subprocess.Popen([sys.executable, '-c', {child!r}], stdout=subprocess.PIPE)\n"
        f"child.stdout.readline(); open({str(pids)!r}, 'w').write(f'{{os.getpid()}} {{child.pid}}')\n{then}"
    )


def worker(monkeypatch, code):
    """Python code in place of the worker, in a process that is followed and ended as the worker is."""

    def start(command, **how):
        return subprocess.Popen([sys.executable, "-c", code], **how)

    its_own = SimpleNamespace(Popen=start, PIPE=subprocess.PIPE, DEVNULL=subprocess.DEVNULL)
    monkeypatch.setattr(process, "subprocess", its_own)  # git is asked for the commit with the other one


def alive(pids):
    found = [psutil.Process(int(pid)) for pid in pids.read_text().split() if psutil.pid_exists(int(pid))]
    return [one for one in found if one.status() != psutil.STATUS_ZOMBIE]


@pytest.mark.parametrize("before_step, last", [(2, 3), (None, 4)], ids=["while it trains", "after the last step"])
@pytest.mark.parametrize("when", ["background", "wait"])
def test_sigterm_ends_the_evaluation_and_names_those_left(
    make_trainer, monkeypatch, caplog, tmp_path, before_step, last, when
):
    """With real processes: the evaluation of step 0 would take minutes; where training waits, only the last one."""
    pids = tmp_path / "pids"
    waits = when == "wait"
    quick = evaluator([])

    def stand_in(trainer):
        def run_job(job, timeout, cancel):
            if waits and job.target.step < last:
                return quick(trainer)(job, timeout, cancel)
            return process.run_job(job, timeout, cancel=cancel)

        return run_job

    worker(monkeypatch, family(pids, "time.sleep(300)"))
    before = signal.getsignal(signal.SIGTERM)
    begun = SendWhenBegun(pids, before_step) if not waits else SendSigterm(before_step)
    start = time.monotonic()
    monkeypatch.setattr(Target, "problem", lambda self: None)
    trainer = trained(make_trainer, stand_in, monkeypatch, [begun], evaluate_checkpoints=when)
    assert trainer.state.global_step == last and time.monotonic() - start < 50
    steps = str(last) if waits else f"0,2,{last}"
    command = f"trl-entropy evaluate --run {trainer.args.output_dir} --checkpoints {steps}"
    assert f"{counted(len(steps.split(',')), 'evaluation')} left to do: {command}" in caplog.text
    assert signal.getsignal(signal.SIGTERM) == before and evaluation_threads() == []
    if not waits:
        assert alive(pids) == [] and "cancelled" not in caplog.text
        log = RunDirectory(trainer.args.output_dir).path / "evaluation" / "step_000000.log"
        assert log.exists()


class SendWhenBegun(SendSigterm):
    """Sends it only when the worker runs."""

    def __init__(self, pids, before_step):
        super().__init__(before_step)
        self.pids = pids

    def on_train_begin(self, args, state, control, **kwargs):
        assert until(lambda: self.pids.exists() and len(self.pids.read_text().split()) == 2)


def test_sigterm_while_training_waits_for_an_evaluation(make_trainer, monkeypatch, caplog):
    """Sent from the evaluation of the last checkpoint, which training waits for after its last step."""

    def stand_in(trainer):
        def run_job(job, timeout, cancel):
            if job.target.step < 4:
                return "not evaluated"
            until(lambda: "waiting for 1 evaluation" in caplog.text)
            os.kill(os.getpid(), signal.SIGTERM)
            assert cancel.wait(60.0)
            return CANCELLED

        return run_job

    caplog.set_level("INFO", logger="trl_entropy")
    trainer = trained(make_trainer, stand_in, monkeypatch, evaluate_checkpoints="background")
    assert trainer.state.global_step == 4
    assert f"1 evaluation left to do: trl-entropy evaluate --run {trainer.args.output_dir}" in caplog.text


def test_an_evaluation_does_not_outlive_a_training_that_fails(make_trainer, monkeypatch, tmp_path):
    class Fail(SendWhenBegun):
        def on_step_end(self, args, state, control, **kwargs):
            raise RuntimeError("diverged")

    pids = tmp_path / "pids"
    worker(monkeypatch, family(pids, "time.sleep(300)"))
    with pytest.raises(RuntimeError, match="diverged"):
        trained(
            make_trainer,
            lambda trainer: process.run_job,
            monkeypatch,
            [Fail(pids, 9)],
            evaluate_checkpoints="background",
        )
    assert alive(pids) == [] and evaluation_threads() == []


@pytest.mark.parametrize("only_model", [False, True])
def test_a_checkpoint_is_not_deleted_before_its_evaluation(make_trainer, monkeypatch, only_model):
    """All evaluations wait until training has made its last step, and the limit is one checkpoint."""
    found = []

    def stand_in(trainer):
        def run_job(job, timeout, cancel):
            assert until(lambda: trainer.state.global_step == 8, cancel)
            found.append((job.target.step, job.target.problem()))
            return "not evaluated"

        return run_job

    trainer = trained(
        make_trainer, stand_in, monkeypatch, evaluate_checkpoints="background", save_total_limit=1, max_steps=8,
        save_only_model=only_model,
    )  # fmt: skip
    assert found == [(step, None) for step in (0, 2, 4, 6, 8)]
    assert [path.name for path in checkpoints_of(Path(trainer.args.output_dir))] == ["checkpoint-8"]


def test_a_question_twice_ends_the_run_at_its_start(make_trainer, monkeypatch, tmp_path):
    records = [json.dumps({"question": "How many?", "answer": f"#### {number}"}) for number in (3, 4)]
    (tmp_path / "data.jsonl").write_text("\n".join(records))
    task = {"task": "gsm8k", "dataset_name": str(tmp_path / "data.jsonl")}
    with pytest.raises(ValueError, match=r"data.jsonl holds 1 held-out question more than once"):
        trained(make_trainer, evaluator([]), monkeypatch, task=task, evaluate_checkpoints="wait")


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
