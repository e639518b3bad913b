"""Callbacks of every run: writing the run directory, and ending with a checkpoint on SIGTERM."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Mapping
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from trl_entropy.config.changed_settings import changed_settings
from trl_entropy.engine import num_trainable, parameter_shape
from trl_entropy.engine.ranks import any_rank
from trl_entropy.runs.directory import RunDirectory
from trl_entropy.runs.evaluations import evaluation_of
from trl_entropy.runs.strict_json import Row

logger = logging.getLogger(__name__)


class RunLogCallback(TrainerCallback):
    """
    Writes the run directory `args.output_dir` on the main process: settings, one line per step, evaluations.

    Attributes:
        settings: settings beside the training arguments (task, model), to be written to `config.yaml` too.
        values: what the present log line has of TRL's metrics, nan included, where TRL logs None.
    """

    def __init__(self) -> None:
        self.settings: dict[str, Any] = {}
        self.values: Mapping[str, float] = {}
        self._row: Row | None = None  # of a step whose line is not written yet

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not state.is_world_process_zero:
            return
        self.run, self._has_written = RunDirectory(args.output_dir), False
        model = kwargs["model"]
        self.run.write_config({**self.settings, **args.to_dict(), "model_config": model.config.to_dict()})
        self.run.write_environment(
            num_processes=args.world_size,
            device=str(args.device),
            num_torch_threads=torch.get_num_threads(),
            num_parameters=sum(parameter_shape(p).numel() for p in model.parameters()),
            num_trainable_parameters=num_trainable(model),
            changed_settings=changed_settings(args),
        )

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        if not state.is_world_process_zero or not logs or not hasattr(self, "run"):
            return
        if any(name.startswith("eval_") for name in logs):
            self.run.append_evaluation(state.global_step, *evaluation_of({**logs, **self.values}))
        elif self._row is not None:  # not the summary at the end of training, which belongs to no step
            self._write_row(state, {name: value for name, value in logs.items() if name not in self.values})

    def step_done(self, state: TrainerState, row: Row, is_logged: bool) -> None:
        """
        Write the line of a step, at once or with what else its log line has.

        Args:
            is_logged: whether `on_log` will be called for this step.
        """
        if not state.is_world_process_zero:
            return
        self._row = row
        if not is_logged:
            self._write_row(state, {})

    def _write_row(self, state: TrainerState, others: Row) -> None:
        assert self._row is not None
        row, self._row = self._row, None
        if not self._has_written:  # another process may have begun in the same directory meanwhile
            self._has_written = True
            if any(written["step"] >= state.global_step for written in self.run.metrics()):
                self.run.check_unused()
        self.run.append_metrics(state.global_step, {**others, **row})

    def add_later(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add metrics to a step whose line has already been written; on the main process only."""
        if hasattr(self, "run"):
            self.run.append_later(step, metrics)


class StopOnSignal(TrainerCallback):
    """
    On SIGTERM: finish the step, write a checkpoint, and end training, on all ranks at the same step.

    transformers' `enable_jit_checkpoint` saves in the middle of a step, and on each rank at a time of its own, so that
    a resumed run would differ from an uninterrupted one.
    """

    def __init__(self) -> None:
        self.received = False
        self._listens = False
        self._previous: Any = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.received = False
        if threading.current_thread() is threading.main_thread():  # Python allows handlers there only
            self._previous, self._listens = signal.signal(signal.SIGTERM, self._on_signal), True

    def _on_signal(self, signum: int, frame: Any) -> None:
        self.received = True

    def give_back(self) -> None:
        """Give the signal back to whoever had it before training; called when `train()` ends, however it does."""
        if self._listens:
            self._listens = False
            signal.signal(signal.SIGTERM, signal.SIG_DFL if self._previous is None else self._previous)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not any_rank(self.received, args):
            return
        self.received = True
        control.should_save = True
        control.should_training_stop = True
        if state.is_world_process_zero:
            path = os.path.join(args.output_dir, f"checkpoint-{state.global_step}")
            logger.warning("SIGTERM: stopping after step %d, writing %s", state.global_step, path)
