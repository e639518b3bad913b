"""An optimizer step after it has ended: what is kept of it, and what is put together from that."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from accelerate.utils import send_to_device
from jaxtyping import Float
from torch import Tensor

from trl_entropy.engine.adamw_step import adamw_settings
from trl_entropy.engine.base import Engine
from trl_entropy.engine.context import UpdateContext
from trl_entropy.estimators.optimizer.adamw import (
    AdamWSettings,
    UpdateParts,
    gradient_coefficient,
    live_preconditioner,
    update_parts_after,
)

ByName = dict[str, Float[Tensor, "..."]]


@dataclass
class AdamWBefore:
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
        update.check_adamw()
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


@dataclass
class KeptUpdate:
    """
    This rank's share of a step that has been made, kept until the next step's completions have been drawn: one copy of
    what this rank holds of the trained parameters, and with `adamw` one of the first moment.

    Attributes:
        theta_before: this rank's share of the parameters before the step.
        adamw: what (T4) needs, if it was asked for.
        correction: what was added to the optimizer's step, whole tensors; empty if nothing was.
    """

    theta_before: dict[str, Tensor]
    adamw: AdamWBefore | None = None
    correction: ByName = field(default_factory=dict)

    @classmethod
    def of(cls, update: UpdateContext, adamw: bool) -> KeptUpdate:
        """To be called in `before_update`; with `adamw` it is collective."""
        return cls(update.shares_before(), AdamWBefore.of(update) if adamw else None)

    def state_dict(self) -> dict[str, Any]:
        """For this rank's file of a checkpoint."""
        return {
            "theta_before": self.theta_before,
            "adamw": self.adamw and self.adamw.state_dict(),
            "correction": self.correction,
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> KeptUpdate:
        adamw = state["adamw"] and AdamWBefore.from_state(state["adamw"])
        return cls(state["theta_before"], adamw, state["correction"])


@dataclass(frozen=True)
class PastUpdate:
    """
    A step that has been made: whole tensors by parameter name, equal on all ranks, as in [`UpdateContext`].

    Attributes:
        params_before, params_after: theta before and after the step.
        update: `params_after` - `params_before`.
        correction: what was added to the optimizer's step; empty if nothing was.
    """

    params_before: ByName
    params_after: ByName
    update: ByName
    correction: ByName
    _adamw: AdamWBefore | None = None
    _exp_avg: ByName = field(default_factory=dict)
    _exp_avg_after: ByName = field(default_factory=dict)
    _exp_avg_sq_after: ByName = field(default_factory=dict)

    @classmethod
    def of(cls, update: UpdateContext, kept: KeptUpdate | None, engine: Engine) -> PastUpdate:
        """The step that `update` describes, to be called in `after_update`. Collective."""
        moments = _moments(None if kept is None else kept.adamw, engine)
        return cls(update.params_before, update.params_after, update.update, dict(update.correction), *moments)

    @classmethod
    def rebuilt(cls, kept: KeptUpdate, engine: Engine) -> PastUpdate:
        """The last step that the optimizer has made, from what was kept of it. Collective."""
        device = engine.accelerator.device
        before = engine.assemble(send_to_device(kept.theta_before, device))
        after = engine.assemble(engine.theta())
        update = {name: after[name] - before[name] for name in after}
        correction = send_to_device(kept.correction, device)
        return cls(before, after, update, correction, *_moments(kept.adamw, engine))

    def parts(self) -> Iterator[tuple[str, UpdateParts]]:
        """The parts of the step (T5), by parameter, without those that it does not change."""
        assert self._adamw is not None, "the step was kept without AdamW's moments"
        for name, settings in self._adamw.settings.items():
            if name not in self._adamw.without_gradient:
                moments = self._exp_avg[name], self._exp_avg_after[name], self._exp_avg_sq_after[name]
                yield (
                    name,
                    update_parts_after(self.params_before[name], *moments, self._adamw.optimizer_step, settings),
                )

    def metric(self) -> ByName:
        """
        lr c (1-b1)/(1-b1^t) M of (T4) by parameter, by which each share of the unclipped gradient enters the step;
        0 where every gradient so far was 0.
        """
        assert self._adamw is not None, "the step was kept without AdamW's moments"
        step, clip = self._adamw.optimizer_step, self._adamw.clip_factor
        return {
            name: gradient_coefficient(settings, step, clip)
            * live_preconditioner(self._exp_avg_sq_after[name], step, settings.betas[1], settings.eps)
            for name, settings in self._adamw.settings.items()
        }


def _moments(adamw: AdamWBefore | None, engine: Engine) -> tuple[AdamWBefore | None, ByName, ByName, ByName]:
    """m before the step, and m and v after it. Collective."""
    if adamw is None:
        return None, {}, {}, {}
    before = engine.assemble(send_to_device(adamw.exp_avg, engine.accelerator.device))
    return adamw, before, engine.moments("exp_avg"), engine.moments("exp_avg_sq")
