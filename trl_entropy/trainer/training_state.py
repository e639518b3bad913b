"""
State that TRL's trainer and ours keep in memory between two steps, and that transformers does not save.

Without it a resumed run would differ from an uninterrupted one if its checkpoint falls between two uses of the same
generation (`steps_per_generation` above `gradient_accumulation_steps`, or `num_iterations` above 1), in the second or
a later epoch, or between two log lines. Each owner of such state returns and restores its own part; this module writes
and reads the file, and owns the part of TRL's generation. Written against trl 1.16 and transformers 5.23;
`tests/contracts` tests the assumptions.
"""

from __future__ import annotations

import contextlib
import pickle
import re
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import send_to_device
from trl import GRPOTrainer

from trl_entropy.runs.state import StateDict, StateOwner

# Of what `save` writes; part of the contract of a checkpoint, so that one of another format is refused.
STATE_FORMAT = 4


def file_of(checkpoint: Path, rank: int) -> Path:
    return checkpoint / f"training_state_{rank}.pt"


def save(owners: Mapping[str, StateOwner], checkpoint: Path, rank: int) -> None:
    """
    Write this process's file into the checkpoint, and read it back.

    Raises:
        ValueError: if the state holds an object that would not be loaded, such as one that a reward has logged.
    """
    torch.save({name: owner.state_dict() for name, owner in owners.items()}, file_of(checkpoint, rank))
    try:
        _read(checkpoint, rank)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        raise ValueError(
            f"the state between two steps holds an object ({found[1] if found else error}) that is no tensor, number "
            "or text, and would not be loaded. Pass none to TRL's log_extra and log_metric"
        ) from error


def _read(checkpoint: Path, rank: int) -> dict[str, Any]:
    return torch.load(file_of(checkpoint, rank), weights_only=True, map_location="cpu")


def load(owners: Mapping[str, StateOwner], checkpoint: Path, rank: int) -> None:
    """Give each owner back what [`save`] wrote of it; the seal's `STATE_FORMAT` says that all of them are there."""
    state = _read(checkpoint, rank)
    for name, owner in owners.items():
        owner.load_state_dict(state[name])


class GenerationWindow:
    """TRL's place in a generation that several steps use: its batch, logged completions and metrics."""

    def __init__(self, trainer: GRPOTrainer) -> None:
        self._trainer = trainer

    def reset(self) -> None:
        """Begin with a new generation: what is left of one that was cut off belongs to no step."""
        self._trainer._step, self._trainer._buffered_inputs = 0, None
        self._trainer._metrics["train"].clear()

    def state_dict(self) -> StateDict:
        """The batch is saved only if a later step uses it; otherwise the next step generates a new one."""
        trainer = self._trainer
        inside_window = trainer._step % (trainer.args.steps_per_generation * trainer.num_iterations) != 0
        return {
            "step": trainer._step,
            "buffered_inputs": trainer._buffered_inputs if inside_window else None,
            "logs": plain_logs(trainer._logs) if inside_window else None,
            "metrics": {name: list(values) for name, values in trainer._metrics["train"].items()},
        }

    def load_state_dict(self, state: StateDict) -> None:
        trainer = self._trainer
        trainer._step = state["step"]
        trainer._buffered_inputs = send_to_device(state["buffered_inputs"], trainer.accelerator.device)
        if state["logs"] is not None:
            restore_logs(trainer._logs, state["logs"])
        trainer._metrics["train"] = defaultdict(list, state["metrics"])


def plain_logs(logs: dict[str, Any], last: int = 0) -> dict[str, Any]:
    """TRL's logged completions without images, as lists; only the last `last` rows, or all if it is 0."""

    def plain(column: Iterable[Any]) -> list[Any]:
        return [value.item() if isinstance(value, np.generic) else value for value in list(column)[-last:]]

    return {
        name: {key: plain(column) for key, column in value.items()} if isinstance(value, dict) else plain(value)
        for name, value in logs.items()
        if name != "images"
    }


@contextlib.contextmanager
def own_logs(trainer: GRPOTrainer) -> Iterator[None]:
    """
    Inside, TRL's logged completions are others, empty at first: those of an evaluation do not push out the last ones
    that were trained on, of which a later step may log its table.
    """

    def empty(column: Any) -> Any:
        return defaultdict(column.default_factory) if isinstance(column, defaultdict) else deque(maxlen=column.maxlen)

    kept = trainer._logs
    trainer._logs = {name: empty(column) for name, column in kept.items()}
    try:
        yield
    finally:
        trainer._logs = kept


def restore_logs(logs: dict[str, Any], saved: dict[str, Any]) -> None:
    """Replace the rows of TRL's logged completions by those that [`plain_logs`] returned."""
    for name, value in saved.items():
        columns = value.items() if isinstance(value, dict) else [(None, value)]
        for key, rows in columns:
            column = logs[name] if key is None else logs[name][key]
            column.clear()
            column.extend(rows)
