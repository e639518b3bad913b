"""`StepRule`: how an optimizer makes its step of a gradient, where that is a diagonal metric times the gradient."""

from __future__ import annotations

import abc
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from trl_entropy.estimators.optimizer.adamw import UpdateParts

# Tensors of an optimizer's state for one parameter, by their names; one that is not there yet is zeros.
State = Mapping[str, Tensor]
# The settings of a parameter group, as `torch.optim` names them.
Group = Mapping[str, Any]


class StepRule(abc.ABC):
    """
    (T5) for one optimizer: dtheta = momentum + decay - coefficient M g, where M is diagonal and held fixed, g is the
    unclipped gradient and the first two parts do not depend on g but through M.

    Everything is about one parameter. To have an optimizer of your own split by the probes, subclass this and call
    [`~trl_entropy.register_step_rule`] with its class. `sum(rule.parts(...))` must be the step that it makes.

    Attributes:
        keys: names of the tensors of `optimizer.state[param]` that the rule reads.
        metric_keys: those of them that [`metric`] and [`advanced`] read.
        counts_steps: whether the rule depends on the number of the step, `optimizer.state[param]["step"]`.
    """

    keys: ClassVar[tuple[str, ...]] = ()
    metric_keys: ClassVar[tuple[str, ...]] = ()
    counts_steps: ClassVar[bool] = True

    def why_not(self, group: Group) -> str:
        """Why the rule does not hold with these settings of a parameter group; empty if it does."""
        return ""

    @abc.abstractmethod
    def advanced(
        self, state: State, clipped: Float[Tensor, "*shape"], param: Float[Tensor, "*shape"], step: int, group: Group
    ) -> State:
        """
        What [`metric`] reads, after the step.

        Args:
            state: before the step.
            clipped: the gradient after clipping.
            step: number of this step, 1 at the first.
        """

    @abc.abstractmethod
    def metric(self, state: State, like: Float[Tensor, "*shape"], step: int, group: Group) -> Float[Tensor, "*shape"]:
        """M after `step` steps, whose `state` is given; 0 where no gradient has ever been. `like` has its shape."""

    @abc.abstractmethod
    def coefficient(self, step: int, group: Group, clip_factor: float = 1.0) -> float:
        """By which -M g enters the step, g unclipped."""

    def momentum(
        self, state: State, metric: Float[Tensor, "*shape"], step: int, group: Group
    ) -> Float[Tensor, "*shape"]:
        """The part that earlier steps make; `state` is that before the step, `metric` that of the step."""
        return torch.zeros_like(metric)

    def decay(
        self, param: Float[Tensor, "*shape"], metric: Float[Tensor, "*shape"], step: int, group: Group
    ) -> Float[Tensor, "*shape"]:
        """The part of weight decay: here of one that is added to the gradient."""
        return -self.coefficient(step, group) * float(group.get("weight_decay") or 0.0) * metric * param

    def parts(
        self,
        state: State,
        gradient: Float[Tensor, "*shape"],
        param: Float[Tensor, "*shape"],
        step: int,
        group: Group,
        clip_factor: float = 1.0,
    ) -> UpdateParts:
        """(T5): all three parts, from what is known before the step."""
        after = self.advanced(state, gradient * clip_factor, param, step, group)
        metric = self.metric(after, gradient, step, group)
        return UpdateParts(
            momentum=self.momentum(state, metric, step, group),
            weight_decay=self.decay(param, metric, step, group),
            gradient=-self.coefficient(step, group, clip_factor) * metric * gradient,
        )


def state_or_zeros(state: State, key: str, like: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """A tensor of the state, or what it starts from."""
    found = state.get(key)
    return torch.zeros_like(like) if found is None else found
