"""
What the steps log: a line of the run log for each of them, and for trackers what `logging_steps` of them have in all.

TRL keeps the values of all steps since the last log line in one list by key, and averages them, whatever they are.
Written against trl 1.16 and transformers 5.23.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_pt_utils import nested_gather

from trl_entropy.runs.log_window import LogWindow
from trl_entropy.runs.state import StateDict
from trl_entropy.runs.strict_json import Row


class StepLog(TrainerCallback):
    """
    The values that TRL has collected for the log, by step and by log line, and the sum of the loss.

    transformers sets its sum of the loss since the last log line to zero after loading a checkpoint and before
    `on_train_begin`, so that event restores it.
    """

    def __init__(self) -> None:
        self._of_step, self._of_line = LogWindow(), LogWindow()
        self._loss: Tensor | None = None
        self._last_step = 0
        self._restored: StateDict | None = None

    def attach(self, trainer: Trainer) -> None:
        """Set the trainer whose metrics are taken."""
        self._trainer = trainer

    def reset(self) -> None:
        """Forget what an earlier training has left, or what was loaded for one that then did not begin."""
        self._of_step.clear()
        self._of_line.clear()
        self._loss, self._restored = None, None

    def add_loss(self, loss: Tensor) -> None:
        """Add a micro-batch's part of the step's loss."""
        self._loss = loss.detach() if self._loss is None else self._loss + loss.detach()

    def end_step(self, grad_norm: Tensor | float | None, learning_rate: float | None) -> Row | None:
        """
        The line of the step that has just ended; None if it was returned before. Collective.

        Args:
            grad_norm, learning_rate: what transformers logs of this step.
        """
        trainer = self._trainer
        if trainer.state.global_step == self._last_step:
            return None
        self._last_step = trainer.state.global_step
        self._take()
        assert self._loss is not None
        loss = nested_gather(self._loss, trainer.args.parallel_mode).mean().item()
        row: Row = {"loss": loss}
        if grad_norm is not None:
            row["grad_norm"] = grad_norm.item() if isinstance(grad_norm, Tensor) else grad_norm
        row["learning_rate"] = trainer._get_learning_rate() if learning_rate is None else learning_rate
        row |= self._of_step.reduced() | {"epoch": trainer.state.epoch}
        self._of_step.clear()
        self._loss = None
        return row

    def end_line(self) -> dict[str, float]:
        """What the steps since the last log line have together; TRL's next log line consists of it."""
        self._take()
        values = self._of_line.reduced()
        self._of_line.clear()
        hand_over(self._trainer, "train", values)
        return values

    def _take(self) -> None:
        """Take over what TRL has collected since the last call."""
        metrics = self._trainer._metrics["train"]
        for window in (self._of_step, self._of_line):
            window.add(metrics)
        metrics.clear()

    # ---- resuming

    def state_dict(self) -> StateDict:
        """Sum of the loss and values since the last log line, and the step up to which the loss has been logged."""
        return {
            "tr_loss": self._trainer._tr_loss.detach().clone(),
            "globalstep_last_logged": self._trainer._globalstep_last_logged,
            "of_line": self._of_line.state_dict(),
        }

    def load_state_dict(self, state: StateDict) -> None:
        self._restored = state

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._last_step, self._loss = state.global_step, None
        self._of_step.clear()  # what an attempt with a larger batch has left, with auto_find_batch_size
        if self._restored is not None:
            self._trainer._tr_loss = self._restored["tr_loss"].to(args.device)
            self._trainer._globalstep_last_logged = self._restored["globalstep_last_logged"]
            self._of_line.load_state_dict(self._restored["of_line"])
            self._restored = None


def end_evaluation(trainer: Trainer, name: str) -> dict[str, float]:
    """
    What the batches of an evaluation have together, by the key of its log line: `eval_reward`, `eval_NAME_reward`.

    Args:
        name: of the evaluation set where the run has several, which TRL leaves out; otherwise empty.
    """
    window = LogWindow()
    window.add(trainer._metrics["eval"])
    values = {f"{name}_{key}" if name else key: value for key, value in window.reduced().items()}
    hand_over(trainer, "eval", values)
    return {f"eval_{key}": value for key, value in values.items()}


def hand_over(trainer: Trainer, mode: str, values: Mapping[str, float]) -> None:
    """Have TRL's next log line of this mode consist of these values."""
    trainer._metrics[mode] = defaultdict(list, {key: [value] for key, value in values.items()})
