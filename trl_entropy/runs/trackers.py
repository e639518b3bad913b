"""Trackers (wandb, MLflow, Trackio, TensorBoard, ...) get numbers only: no infinity, no nan, nothing in its place."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from transformers import Trainer, TrainerCallback
from transformers.integrations import TensorBoardCallback
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

_TRACKERS = tuple(INTEGRATION_TO_CALLBACK.values())


def shown(logs: Mapping[str, Any]) -> dict[str, Any]:
    """`logs` without infinities, nan, and the None that TRL puts in the place of nan."""
    return {key: value for key, value in logs.items() if not _is_missing(value)}


def show_numbers_only(callbacks: Iterable[TrainerCallback]) -> None:
    """Leave out of what those of `report_to` log what [`shown`] leaves out; other callbacks get everything."""
    for callback in callbacks:
        if isinstance(callback, _TRACKERS) and "on_log" not in vars(callback):
            callback.on_log = functools.partial(_logging, callback.on_log)  # type: ignore[method-assign]


def add_later(callbacks: Iterable[TrainerCallback], trainer: Trainer, step: int, metrics: Mapping[str, float]) -> None:
    """Have those of `report_to` log numbers of an earlier step, except TensorBoard: see `tensorboard.add_later`."""
    state = copy.copy(trainer.state)
    state.global_step = step
    for callback in callbacks:
        if isinstance(callback, _TRACKERS) and not isinstance(callback, TensorBoardCallback):
            callback.on_log(trainer.args, state, trainer.control, logs=shown(metrics), model=trainer.model)


def _logging(original: Callable[..., Any], *args: Any, logs: Mapping[str, Any] | None = None, **kwargs: Any) -> Any:
    return original(*args, logs=None if logs is None else shown(logs), **kwargs)


def _is_missing(value: object) -> bool:
    return value is None or (isinstance(value, float) and not math.isfinite(value))
