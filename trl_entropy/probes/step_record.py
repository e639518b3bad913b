"""`StepRecord`: what is known of one optimizer step, kept after its update until the next step."""

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

    The `UpdateContext` of a step can be read only until the step ends; this record stays until the next step has one,
    for probes that finish their measurement later.

    Attributes:
        step: 1, 2, ...: the update from theta_(step - 1) to theta_step.
        rollouts: the step's own completions.
        loss_coefficients: how the step's loss depends on the log-probability and entropy of each of their tokens (T9),
            nats^-1; None unless a probe `needs_loss_coefficients`.
        params_before, update: whole tensors by parameter name, once [`keep`] has been called; empty before.
    """

    step: int
    rollouts: RolloutBatch
    loss_coefficients: LossCoefficients | None = None
    params_before: dict[str, Tensor] = field(default_factory=dict)
    update: dict[str, Tensor] = field(default_factory=dict)

    def keep(self, update: UpdateContext) -> None:
        """Keep the parameters before the step and the update; call after the optimizer's step. Collective."""
        self.params_before, self.update = dict(update.params_before), dict(update.update)
