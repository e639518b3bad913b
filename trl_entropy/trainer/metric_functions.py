"""The user's metric functions: what they say of a step's completions, which changes nothing."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from accelerate.utils import gather_object
from torch import nn
from transformers import TrainerState

from trl_entropy.config.dr_grpo import DrGRPOConfig
from trl_entropy.tasks.completion_functions import CompletionFunction

MetricFunction = CompletionFunction | Callable[..., Any]


@runtime_checkable
class MetricHost(Protocol):
    """What is used of the trainer."""

    args: DrGRPOConfig
    state: TrainerState
    model: nn.Module
    environments: list[Any] | None
    reward_func_names: list[str]
    _metrics: dict[str, dict[str, list[float]]]

    @property
    def current_step(self) -> int: ...

    def _log_completion_extra(self, column: str, values: list[Any]) -> None: ...


class MetricFunctions:
    """
    Calls the metric functions on completions, and logs `metrics/NAME/mean` and `metrics/NAME/std`: over all processes'
    completions that have a value. Each is a column in the tables of completions.

    Args:
        functions: with the signature of TRL's reward functions; None as a value: it does not apply.
    """

    def __init__(self, trainer: MetricHost, functions: Sequence[MetricFunction]) -> None:
        self._trainer, self._functions = trainer, [_as_named(one) for one in functions]
        names = [one.short for one in self._functions]
        if taken := {*names} & {*trainer.reward_func_names} | {name for name in names if names.count(name) > 1}:
            raise ValueError(
                f"metric_funcs: {', '.join(sorted(taken))} is the name of another function too, and the tables of "
                "completions have a column for each. Give it another name."
            )

    @property
    def names(self) -> list[str]:
        return [function.short for function in self._functions]

    def measure(
        self,
        rows: Sequence[Mapping[str, Any]],
        completions: Sequence[Any],
        ids: Sequence[Any],
        always: Collection[str] = (),
    ) -> dict[str, list[float]]:
        """
        Measure this process's completions, every `metric_every` steps and in every evaluation.

        Args:
            rows: the dataset's row of each completion.
            always: names of functions that are called at other steps too, when nothing is logged of them.

        Returns:
            Of each function that was called its values, nan where it does not apply.
        """
        trainer, training = self._trainer, self._trainer.model.training
        is_due = not training or trainer.current_step % trainer.args.metric_every == 0
        more = {"trainer_state": trainer.state, "environments": trainer.environments}
        measured = dict[str, list[float]]()
        for function in self._functions:
            if is_due or function.short in always:
                measured[function.short] = function(rows, completions, ids, **more)
            values = measured[function.short] if is_due else [math.nan] * len(completions)
            known = [None if math.isnan(value) else value for value in values]
            trainer._log_completion_extra(function.short, known)  # a column has a row for each completion
            if not is_due:
                continue
            every = torch.tensor([value for value in gather_object(known) if value is not None], dtype=torch.float64)
            logged = trainer._metrics["train" if training else "eval"]
            if len(every):
                logged[f"metrics/{function.short}/mean"].append(every.mean().item())
                logged[f"metrics/{function.short}/std"].append(every.std(correction=0).item())
        return measured


def _as_named(function: MetricFunction) -> CompletionFunction:
    if isinstance(function, CompletionFunction):
        return function
    name = getattr(function, "__name__", type(function).__name__)
    return CompletionFunction(name, name, function, None, "metric")
