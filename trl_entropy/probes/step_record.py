"""`StepRecord`: what is known of one optimizer step, which outlives the update that it is about."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from trl_entropy.engine import UpdateContext
from trl_entropy.gradients.loss_coefficients import LossCoefficients
from trl_entropy.rollouts.batch import RolloutBatch


@dataclass
class StepRecord:
    """
    One optimizer step of this process.

    An `UpdateContext` closes when its step is done; this record stays, until the next step has one, for a probe that
    finishes its measurement later.

    Attributes:
        step: 1, 2, ...: the update from theta_(step - 1) to theta_step.
        rollouts: the step's own completions.
        loss_coefficients: how the step's loss depends on their scores (T9), nats^-1; None unless a probe
            `needs_loss_coefficients`.
        params_before, update: what [`keep`] kept, whole tensors by parameter name; empty if nothing asked for it.
    """

    step: int
    rollouts: RolloutBatch
    loss_coefficients: LossCoefficients | None = None
    params_before: dict[str, Tensor] = field(default_factory=dict)
    update: dict[str, Tensor] = field(default_factory=dict)

    def keep(self, update: UpdateContext) -> None:
        """Keep theta before the step and the step itself, once the optimizer has made it. Collective."""
        self.params_before, self.update = dict(update.params_before), dict(update.update)
