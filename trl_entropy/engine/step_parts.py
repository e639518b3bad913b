"""How a step splits into parts (T5) once it has been made: what must be kept of it, and what comes of that."""

from __future__ import annotations

import abc
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from accelerate.utils import send_to_device
from jaxtyping import Float
from torch import Tensor

from trl_entropy.engine.base import Engine
from trl_entropy.engine.context import UpdateContext
from trl_entropy.engine.optimizer_step import adamw_settings, metric_of_step, update_parts
from trl_entropy.estimators.optimizer.adamw import (
    AdamWSettings,
    UpdateParts,
    gradient_coefficient,
    live_preconditioner,
    update_parts_after,
)
from trl_entropy.estimators.optimizer.rules import AdamWRule

ByName = Mapping[str, Float[Tensor, "..."]]


@dataclass(frozen=True)
class MadeStep(abc.ABC):
    """A step that has been made, in its parts."""

    @abc.abstractmethod
    def parts(self, params_before: ByName, step: ByName) -> Iterator[tuple[str, UpdateParts]]:
        """By parameter, without those that it does not change; `step` is what the optimizer added to each."""

    @abc.abstractmethod
    def metric(self) -> ByName:
        """
        coefficient c M of (T5) by parameter, by which each share of the unclipped gradient enters the step; 0 where
        every gradient so far was 0.
        """


class StepBefore(abc.ABC):
    """What a step had before it was made, and no longer has after it."""

    @abc.abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """For this rank's file of a checkpoint."""

    @abc.abstractmethod
    def made(self, engine: Engine) -> MadeStep:
        """To be called when the step has been made. Collective."""


@dataclass
class AdamWBefore(StepBefore):
    """
    What AdamW's step (T4) had before it was made and no longer has after it.

    Attributes:
        exp_avg: this rank's share of m before the step.
        settings: lr, betas, eps and weight decay of the step, by parameter name.
        optimizer_step: t of (T4), the step included.
        clip_factor: c of (T4).
        without_gradient: parameters that the step left as they were.
    """

    exp_avg: dict[str, Tensor]
    settings: dict[str, AdamWSettings]
    optimizer_step: int
    clip_factor: float
    without_gradient: frozenset[str]

    @classmethod
    def of(cls, update: UpdateContext) -> AdamWBefore:
        """To be called in `before_update`. Collective."""
        return cls(
            update.shares_of_moment("exp_avg"),
            adamw_settings(update),
            update.optimizer_step,
            update.clip_factor,
            update.without_gradient,
        )

    def state_dict(self) -> dict[str, Any]:
        return {
            "exp_avg": self.exp_avg,
            "settings": {name: asdict(settings) for name, settings in self.settings.items()},
            "optimizer_step": self.optimizer_step,
            "clip_factor": self.clip_factor,
            "without_gradient": sorted(self.without_gradient),
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> AdamWBefore:
        settings = {name: AdamWSettings(**values) for name, values in state["settings"].items()}
        named = {"settings": settings, "without_gradient": frozenset(state["without_gradient"])}
        return cls(**{**state, **named})

    def made(self, engine: Engine) -> MadeStep:
        before = engine.assemble(send_to_device(self.exp_avg, engine.accelerator.device))
        return _MadeByAdamW(self, before, engine.moments("exp_avg"), engine.moments("exp_avg_sq"))


@dataclass
class RuleBefore(StepBefore):
    """
    The parts of a step (T5) by another rule than AdamW's, known before it is made: three vectors of all trainable
    parameters, on every rank.

    Attributes:
        metric: coefficient c M, by which each share of the unclipped gradient enters the step.
        momentum, weight_decay: the parts of the update, without the parameters that the step leaves as they are.
    """

    metric: ByName
    momentum: ByName
    weight_decay: ByName

    @classmethod
    def of(cls, update: UpdateContext) -> RuleBefore:
        """To be called in `before_update`. Collective."""
        momentum, decay = {}, {}
        for name, part in update_parts(update):
            momentum[name], decay[name] = part.momentum, part.weight_decay
        return cls(metric_of_step(update), momentum, decay)

    def state_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    def made(self, engine: Engine) -> MadeStep:
        return _MadeByRule(RuleBefore(**send_to_device(vars(self), engine.accelerator.device)))


@dataclass(frozen=True)
class _MadeByAdamW(MadeStep):
    before: AdamWBefore
    exp_avg: ByName
    exp_avg_after: ByName
    exp_avg_sq_after: ByName

    def parts(self, params_before: ByName, step: ByName) -> Iterator[tuple[str, UpdateParts]]:
        number = self.before.optimizer_step
        for name, settings in self.before.settings.items():
            if name not in self.before.without_gradient:
                moments = self.exp_avg[name], self.exp_avg_after[name], self.exp_avg_sq_after[name]
                yield name, update_parts_after(params_before[name], *moments, number, settings)

    def metric(self) -> ByName:
        step, clip = self.before.optimizer_step, self.before.clip_factor
        return {
            name: gradient_coefficient(settings, step, clip)
            * live_preconditioner(self.exp_avg_sq_after[name], step, settings.betas[1], settings.eps)
            for name, settings in self.before.settings.items()
        }


@dataclass(frozen=True)
class _MadeByRule(MadeStep):
    before: RuleBefore

    def parts(self, params_before: ByName, step: ByName) -> Iterator[tuple[str, UpdateParts]]:
        for name, momentum in self.before.momentum.items():
            decay = self.before.weight_decay[name]
            yield name, UpdateParts(momentum, decay, step[name] - momentum - decay)

    def metric(self) -> ByName:
        return self.before.metric


def step_before(update: UpdateContext) -> StepBefore:
    """To be called in `before_update`. Collective."""
    return AdamWBefore.of(update) if type(update.rule) is AdamWRule else RuleBefore.of(update)


def step_before_from(state: Mapping[str, Any]) -> StepBefore:
    """From what `state_dict` returned."""
    return AdamWBefore.from_state(state) if "exp_avg" in state else RuleBefore(**state)
