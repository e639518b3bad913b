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
        loss_coefficients: how the step's loss depends on their scores (T9), nats^-1; None unless a probe
            `needs_loss_coefficients`.
        params_before, update: theta before the step, and the step with what corrected it: whole tensors by parameter
            name, from the end of the step until the next completions have been drawn, if [`keep_update`] asked for
            them; else empty.
    """

    step: int
    rollouts: RolloutBatch
    loss_coefficients: LossCoefficients | None = None
    params_before: dict[str, Tensor] = field(default_factory=dict)
    update: dict[str, Tensor] = field(default_factory=dict)

    _keeps_update: bool = False

    def keep_update(self) -> None:
        """Have theta before the step and the step itself kept. Call it in an event of the update, on all ranks."""
        self._keeps_update = True

    def take(self, update: UpdateContext) -> None:
        """Keep what [`keep_update`] asked for, when no probe changes the step any more. Collective."""
        if self._keeps_update:
            self.params_before, self.update = dict(update.params_before), dict(update.update)

    def forget_update(self) -> None:
        """Let go of what [`take`] kept: two vectors of all trainable parameters."""
        self.params_before, self.update = {}, {}
