"""The user's metric functions: what they say of a step's completions, which changes nothing."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import TrainerState

from trl_entropy.config.dr_grpo import DrGRPOConfig
from trl_entropy.estimators.statistics.estimate import delta_method
from trl_entropy.probes.probe import Probe
from trl_entropy.probes.step_record import StepRecord
from trl_entropy.tasks.completion_functions import CompletionFunction

MetricFunction = CompletionFunction | Callable[..., Any]


@runtime_checkable
class MetricHost(Protocol):
    """What is used of the trainer."""

    args: DrGRPOConfig
    state: TrainerState
    model: nn.Module
    environments: list[Any] | None
    tools: list[Any]
    rollout_func: Any
    num_generations: int
    num_generations_eval: int
    _tokenizer: Any
    reward_func_names: list[str]
    _metrics: dict[str, dict[str, list[float]]]

    @property
    def current_step(self) -> int: ...

    def _log_completion_extra(self, column: str, values: list[Any]) -> None: ...


class MetricFunctions:
    """
    Calls the metric functions on completions, and logs `metrics/NAME/mean`, `metrics/NAME/mean_stderr`, its standard
    error clustered by prompt, and `metrics/NAME/std`: over all processes' completions that have a value. Each function
    is a column in the tables of completions.

    Args:
        functions: with the signature of TRL's reward functions; None as a value: it does not apply.
    """

    def __init__(self, trainer: MetricHost, functions: Sequence[MetricFunction]) -> None:
        self._trainer, self.functions = trainer, named_functions(functions)
        names = [one.short for one in self.functions]
        if taken := {*names} & {*trainer.reward_func_names} | {name for name in names if names.count(name) > 1}:
            raise ValueError(
                f"metric_funcs: {', '.join(sorted(taken))} is the name of another function too, and the tables of "
                "completions have a column for each. Give it another name."
            )

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
        if not self.functions:
            return {}
        trainer, training = self._trainer, self._trainer.model.training
        is_due = not training or trainer.current_step % trainer.args.metric_every == 0
        nothing, more = (
            [math.nan] * len(completions),
            {"trainer_state": trainer.state, "environments": trainer.environments},
        )
        measured = {
            function.short: function(rows, completions, ids, **more)
            for function in self.functions
            if is_due or function.short in always
        }
        shown = [measured[function.short] if is_due else nothing for function in self.functions]
        for function, values in zip(self.functions, shown, strict=True):
            known = [None if math.isnan(value) else value for value in values]
            trainer._log_completion_extra(function.short, known)  # a column has a row for each completion
        own = torch.tensor(shown, dtype=torch.float64).reshape(len(shown), len(completions)).T
        every = torch.tensor(gather_object(own.tolist()), dtype=torch.float64)
        size = trainer.num_generations if training else trainer.num_generations_eval
        found = statistics_of(self.functions, every, torch.arange(len(every)) // size)
        for name, value in found.items():
            trainer._metrics["train" if training else "eval"][name].append(value)
        return measured


class MetricsOfProbe(Probe):
    """
    Logs `metrics/NAME/probe_mean`, its standard error `probe_mean_stderr` and `probe_std`: the metric functions on the
    completions E that the entropy probe has measured a step on, without weights, so that they are of the policy that
    drew E: the one after the step for `next_rollouts`, the one before it otherwise.
    """

    name = "metrics"

    def __init__(self, functions: Sequence[MetricFunction]) -> None:
        super().__init__()
        self._functions, self._logged = named_functions(functions), 0

    def watches_updates(self) -> bool:
        """False: it only follows the entropy probe, which has the engine if it needs one."""
        return False

    def on_after_update(self, args, state, control, *, metrics, record, accelerator, **kwargs: Any) -> None:
        self._log(metrics, record, accelerator)

    def on_rollouts_drawn(self, args, state, control, *, metrics, record, accelerator, **kwargs: Any) -> None:
        self._log(metrics, record, accelerator)

    def on_no_more_rollouts(self, args, state, control, *, metrics, record, accelerator, **kwargs: Any) -> None:
        self._log(metrics, record, accelerator)

    def _log(self, metrics: dict[str, float], record: StepRecord | None, accelerator: Accelerator) -> None:
        """Once for each step, as soon as its E is there."""
        if record is None or record.probe_batch is None or record.step == self._logged:
            return
        completions = record.probe_batch.completions
        own = [completions.values.get(f"metrics/{function.short}") for function in self._functions]
        if known := [column for column in own if column is not None]:  # all of them or none
            values, prompts = accelerator.gather((torch.stack(known, dim=1), completions.prompt_index))
            metrics |= statistics_of(self._functions, values.cpu(), prompts.cpu(), "probe_")
            self._logged = record.step


def statistics_of(
    functions: Sequence[CompletionFunction], values: Float[Tensor, "B M"], prompts: Int[Tensor, " B"], prefix: str = ""
) -> dict[str, float]:
    """Of each function's known values: mean, its standard error clustered by prompt, spread; nothing without any."""
    found: dict[str, float] = {}
    for function, column in zip(functions, values.double().T, strict=True):
        known = ~column.isnan()
        if not known.any():
            continue
        name, own = f"metrics/{function.short}/{prefix}", column[known]
        found |= {f"{name}mean": own.mean().item(), f"{name}std": own.std(correction=0).item()}
        if len(prompts[known].unique()) > 1:
            mean = delta_method(lambda m: m[0], own[:, None])
            found[f"{name}mean_stderr"] = mean.estimate(prompts[known]).stderr
    return found


def named_functions(functions: Sequence[MetricFunction]) -> list[CompletionFunction]:
    """Each with its own name."""
    return [_as_named(one) for one in functions]


def _as_named(function: MetricFunction) -> CompletionFunction:
    if isinstance(function, CompletionFunction):
        return function
    name = getattr(function, "__name__", type(function).__name__)
    return CompletionFunction(name, name, function, None, "metric")
