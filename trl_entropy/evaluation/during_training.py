"""Evaluation of checkpoints during training: the setting `evaluate_checkpoints` of [`~trl_entropy.DrGRPOConfig`]."""

from __future__ import annotations

import logging
import queue
import threading
import time
from pathlib import Path

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from trl_entropy.engine.ranks import any_rank
from trl_entropy.evaluation.plan import ALL, PROFILES, Job, Target, is_done, read_config, settings_of, targets_of
from trl_entropy.evaluation.process import describe, run_job
from trl_entropy.runs.directory import RunDirectory

logger = logging.getLogger(__name__)

WAIT = "wait"
_BATCH_SIZE = 256  # completions; halved on out-of-memory
_LOOK_EVERY = 0.1  # seconds


class EvaluateCheckpoints(TrainerCallback):
    """
    Evaluates the start policy, and each checkpoint as soon as it is written, as `trl-entropy evaluate` does.

    The main process starts one evaluation after another, each in a process of its own, so that the random state, the
    memory and the numbers of training do not change. If an evaluation fails, a warning names the checkpoint and
    training goes on; `trl-entropy evaluate` can repeat it later. A resumed run first evaluates the checkpoints that
    are still missing.

    Args:
        when: `"background"`: training goes on meanwhile, and exits only after the last evaluation has finished;
            `"wait"`: all processes wait for each evaluation.
        profile: `"quick"` or `"full"`, as in `trl-entropy evaluate`.
    """

    def __init__(self, when: str, profile: str) -> None:
        self.when, self.profile = when, PROFILES[profile]
        self._targets: queue.Queue[Target] = queue.Queue()
        self._cancel = threading.Event()
        self._thread: threading.Thread | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Queue what is not evaluated yet. Runs after [`RunLogCallback`], which writes `config.yaml`."""
        self._run = Path(args.output_dir)
        if state.is_world_process_zero:
            self._config = read_config(self._run)
            self._start()
            for target in targets_of(self._run, self._config, ALL):
                if target.step <= state.global_step:
                    self._targets.put(target)
        self._wait_if_asked(args)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object) -> None:
        if state.is_world_process_zero:
            step = state.global_step
            self._targets.put(Target(step, str(self._run / f"checkpoint-{step}")))
        self._wait_if_asked(args)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Wait for the evaluations that are left; a run that was stopped early does not wait."""
        left = self._targets.unfinished_tasks
        if state.global_step < state.max_steps:
            self._cancel.set()
            if left:
                logger.warning("%d evaluations are left; to do them: trl-entropy evaluate --run %s", left, self._run)
        elif left:
            logger.info("training is done; waiting for %d evaluations of its checkpoints", left)
        self._wait(args)
        self._cancel.set()

    def _start(self) -> None:
        """Start the thread that evaluates, unless that of an earlier `train()` which failed still runs."""
        if self._thread is not None and self._cancel.is_set():
            self._thread.join()
        if self._thread is None or not self._thread.is_alive():
            self._cancel.clear()
            self._thread = threading.Thread(target=self._work, daemon=True)
            self._thread.start()

    def _wait_if_asked(self, args: TrainingArguments) -> None:
        if self.when == WAIT:
            self._wait(args)

    def _wait(self, args: TrainingArguments) -> None:
        """Wait on all ranks until the main one has no evaluation left; polling, so that no collective times out."""
        while any_rank(self._targets.unfinished_tasks > 0, args):
            time.sleep(_LOOK_EVERY)

    def _work(self) -> None:
        """Evaluate what is queued; runs in a thread of the main process."""
        while not self._cancel.is_set():
            try:
                target = self._targets.get(timeout=_LOOK_EVERY)
            except queue.Empty:
                continue
            try:
                self._evaluate(target)
            except Exception:
                logger.exception("evaluation of step %d failed", target.step)
            finally:
                self._targets.task_done()
        while not self._targets.empty():
            self._targets.get()
            self._targets.task_done()

    def _evaluate(self, target: Target) -> None:
        directory, settings = RunDirectory(self._run), settings_of(self._config, self.profile)
        if is_done(self._run, target, settings):
            return
        output = str(directory.checkpoint_folder(target.step))
        device = "cpu" if self._config.get("use_cpu") else "auto"
        problem = run_job(
            Job(target, settings, output, _BATCH_SIZE, device), self.profile.timeout, cancel=self._cancel
        )
        directory.write_checkpoint_tables()
        if problem is None:
            logger.info("evaluated step %d: %s", target.step, describe(directory.checkpoint_summary(target.step)))
        elif not self._cancel.is_set():
            logger.warning("evaluation of step %d failed: %s", target.step, problem)
