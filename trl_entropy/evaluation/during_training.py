"""Evaluation of checkpoints during training: the setting `evaluate_checkpoints` of [`~trl_entropy.DrGRPOConfig`]."""

from __future__ import annotations

import logging
import queue
import shlex
import threading
import time
from collections.abc import Callable
from pathlib import Path

from accelerate.utils.memory import clear_device_cache
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from trl_entropy.engine.ranks import any_rank
from trl_entropy.evaluation.plan import (
    ALL,
    BATCH_SIZE,
    PROFILES,
    Job,
    Target,
    caveat_of,
    check_functions,
    is_done,
    read_config,
    settings_of,
    targets_of,
)
from trl_entropy.evaluation.problems import held_out_problems
from trl_entropy.evaluation.process import describe, run_job
from trl_entropy.runs.counted import counted
from trl_entropy.runs.directory import RunDirectory

logger = logging.getLogger(__name__)

WAIT = "wait"
_LOOK_EVERY = 0.1  # seconds


class EvaluateCheckpoints(TrainerCallback):
    """
    Evaluates the start policy, and each checkpoint as soon as it is written, as `trl-entropy evaluate` does.

    The main process starts one evaluation after another, each in a process of its own, so that the random state, the
    memory and the numbers of training do not change. Before each it gives back the device memory that torch keeps for
    later tensors of training. If an evaluation fails, a warning names the checkpoint and
    training goes on; `trl-entropy evaluate` can repeat it later. A resumed run first evaluates the checkpoints that
    are still missing.

    Args:
        when: `"background"`: training goes on meanwhile, and exits only after the last evaluation has finished;
            `"wait"`: all processes wait for each evaluation. SIGTERM ends the wait and the evaluation.
        profile: `"quick"` or `"full"`, as in `trl-entropy evaluate`.
        is_told_to_end: whether this process has got SIGTERM.
    """

    def __init__(self, when: str, profile: str, is_told_to_end: Callable[[], bool] = lambda: False) -> None:
        self.when, self.profile = when, PROFILES[profile]
        self._is_told_to_end = is_told_to_end
        self._targets: queue.Queue[Target] = queue.Queue()
        self._left: dict[int, Target] = {}  # queued or being evaluated, by step
        self._cancel = threading.Event()
        self._thread: threading.Thread | None = None

    def steps_left(self) -> set[int]:
        """The steps whose checkpoints are queued or being evaluated, and must not be deleted."""
        return set(self._left)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Queue what is not evaluated yet. Runs after [`RunLogCallback`], which writes `config.yaml`."""
        self._run = Path(args.output_dir)
        if state.is_world_process_zero:
            self._config = read_config(self._run)
            self._settings = settings_of(self._config, self.profile)
            check_functions(self._run, self._config, may_import=True)
            held_out_problems(self._settings, None)  # a fault in the data ends the run here, not each evaluation
            if caveat := caveat_of(self._config):
                logger.warning("evaluate_checkpoints: %s", caveat)
            self._start()
            for target in targets_of(self._run, self._config, ALL):
                if target.step <= state.global_step:
                    self._queue(target)
        self._wait_if_asked(args)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object) -> None:
        if state.is_world_process_zero:
            step = state.global_step
            self._queue(Target(step, str(self._run / f"checkpoint-{step}")))
        self._wait_if_asked(args)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Wait for the evaluations that are left; a run that is told to end names them instead."""
        if self._left and not self._is_told_to_end():
            logger.info("training is done; waiting for %s", counted(len(self._left), "evaluation"))
        self._wait(args)
        self.end()

    def end(self) -> None:
        """End the evaluation that is being made, and name those that are left; what it has generated is kept."""
        if self._thread is None:
            return
        self._stop()
        self._thread = None
        if self._left:
            steps = ",".join(map(str, sorted(self._left)))
            command = f"trl-entropy evaluate --run {shlex.quote(str(self._run))} --checkpoints {steps}"
            logger.warning("%s left to do: %s", counted(len(self._left), "evaluation"), command)

    def _stop(self) -> None:
        self._cancel.set()
        if self._thread is not None:
            self._thread.join()

    def _queue(self, target: Target) -> None:
        self._left[target.step] = target
        self._targets.put(target)

    def _start(self) -> None:
        """Start the thread that evaluates; that of an earlier `train()` has ended."""
        self.end()
        self._cancel, self._targets, self._left = threading.Event(), queue.Queue(), {}
        self._thread = threading.Thread(target=self._work, name="evaluation", daemon=True)
        self._thread.start()

    def _wait_if_asked(self, args: TrainingArguments) -> None:
        if self.when == WAIT:
            self._wait(args)

    def _wait(self, args: TrainingArguments) -> None:
        """
        Wait on all ranks until the main one has no evaluation left, or one is told to end.

        Polling, so that no collective times out.
        """
        while any_rank(bool(self._left) and not self._cancel.is_set(), args):
            if any_rank(self._is_told_to_end(), args):
                self._stop()
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
            if not self._cancel.is_set():
                self._left.pop(target.step, None)

    def _evaluate(self, target: Target) -> None:
        directory = RunDirectory(self._run)
        if is_done(self._run, target, self._settings, any_sampler=True):
            directory.write_checkpoint_tables()  # a training that was killed may have left them without its results
            return
        output = str(directory.checkpoint_folder(target.step))
        device = "cpu" if self._config.get("use_cpu") else "auto"
        job = Job(target, self._settings, output, BATCH_SIZE, device)
        clear_device_cache()
        problem = run_job(job, self.profile.timeout, cancel=self._cancel)
        directory.write_checkpoint_tables()
        if problem is None:
            logger.info("evaluated step %d: %s", target.step, describe(directory.checkpoint_summary(target.step)))
        elif not self._cancel.is_set():
            logger.warning("evaluation of step %d failed: %s", target.step, problem)
