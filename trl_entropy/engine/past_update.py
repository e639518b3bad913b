"""An optimizer step after it has ended: what is kept of it, and what is put together from that."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from accelerate.utils import send_to_device
from jaxtyping import Float
from torch import Tensor

from trl_entropy.engine.base import Engine
from trl_entropy.engine.context import Differences, UpdateContext
from trl_entropy.engine.step_parts import MadeStep, StepBefore, step_before, step_before_from
from trl_entropy.estimators.optimizer.adamw import UpdateParts

ByName = Mapping[str, Float[Tensor, "..."]]


@dataclass
class KeptUpdate:
    """
    This rank's share of a step that has been made, kept until the next step's completions have been drawn: one copy of
    what this rank holds of the trained parameters, and with `before` one of AdamW's first moment, or for another
    optimizer three whole vectors of the trained parameters.

    Attributes:
        theta_before: this rank's share of the parameters before the step.
        before: what splits the step into its parts (T5), if it was asked for.
        correction: what was added to the optimizer's step, whole tensors; empty if nothing was.
    """

    theta_before: dict[str, Tensor]
    before: StepBefore | None = None
    correction: ByName = field(default_factory=dict)

    @classmethod
    def of(cls, update: UpdateContext, parts: bool) -> KeptUpdate:
        """To be called in `before_update`; with `parts` it is collective."""
        return cls(update.shares_before(), step_before(update) if parts else None)

    def state_dict(self) -> dict[str, Any]:
        """For this rank's file of a checkpoint."""
        return {
            "theta_before": self.theta_before,
            "before": self.before and self.before.state_dict(),
            "correction": self.correction,
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> KeptUpdate:
        before = state["before"] and step_before_from(state["before"])
        return cls(state["theta_before"], before, state["correction"])


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
    _made: MadeStep | None = None

    @classmethod
    def of(cls, update: UpdateContext, kept: KeptUpdate | None, engine: Engine) -> PastUpdate:
        """The step that `update` describes, to be called in `after_update`. Collective."""
        made = None if kept is None or kept.before is None else kept.before.made(engine)
        return cls(update.params_before, update.params_after, update.update, dict(update.correction), made)

    @classmethod
    def rebuilt(cls, kept: KeptUpdate, engine: Engine) -> PastUpdate:
        """The last step that the optimizer has made, from what was kept of it. Collective."""
        device = engine.accelerator.device
        before, after = send_to_device(kept.theta_before, device), engine.theta()
        correction = send_to_device(kept.correction, device)
        ends = engine.assemble(before), engine.assemble(after)
        made = None if kept.before is None else kept.before.made(engine)
        return cls(*ends, engine.assemble(Differences(after, before)), correction, made)

    def parts(self) -> Iterator[tuple[str, UpdateParts]]:
        """The parts of the step (T5), by parameter, without those that it does not change."""
        assert self._made is not None, "the step was kept without its parts"
        step = {name: made - self.correction[name] for name, made in self.update.items()} if self.correction else None
        return self._made.parts(self.params_before, step or self.update)

    def metric(self) -> ByName:
        """
        lr c (1-b1)/(1-b1^t) M of (T4) by parameter, by which each share of the unclipped gradient enters the step;
        0 where every gradient so far was 0.
        """
        assert self._made is not None, "the step was kept without its parts"
        return self._made.metric()
