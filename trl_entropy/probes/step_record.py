"""`StepRecord`: what is known of one optimizer step, kept after its update until the next step has begun."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

from accelerate.utils import send_to_device
from jaxtyping import Float
from torch import Tensor

from trl_entropy.engine import KeptUpdate, UpdateContext
from trl_entropy.gradients.loss_coefficients import LossCoefficients
from trl_entropy.gradients.scores import TokenScores
from trl_entropy.rollouts.batch import RolloutBatch
from trl_entropy.rollouts.completions import Completions
from trl_entropy.rollouts.pixel_inputs import PixelInputs
from trl_entropy.runs.state import StateDict


class ScoredCompletions(NamedTuple):
    """
    The completions E that the entropy probe has measured a step on, which are independent of it, and their tokens at
    both of its ends. This process's rows.

    Attributes:
        completions: E; `loss_mask` is 1 for the tokens that the policy drew.
        before, after: entropy and log-probability of each token, nats, with the parameters from before and from after
            the step: `before.entropy[0]`. `before.entropy[1]` is the first derivative along the update, where the
            probe has taken it.
        weights_before, weights_after: (T6), token by token: the weighted mean over E's tokens of what a token's prefix
            decides, such as its entropy, is the mean under the policy from before, or from after, the step.
    """

    completions: Completions
    before: TokenScores
    after: TokenScores
    weights_before: Float[Tensor, "B T"]
    weights_after: Float[Tensor, "B T"]


@dataclass
class StepRecord:
    """
    One optimizer step of this process.

    The `UpdateContext` of a step can be read only until the step ends; this record stays until the next step has one,
    for probes that finish their measurement later. A checkpoint keeps it if its update is kept.

    Attributes:
        step: 1, 2, ...: the update from theta_(step - 1) to theta_step.
        rollouts: the step's own completions.
        learning_rate: of the step, as transformers logs it; nan before its update.
        loss_coefficients: how the step's loss depends on their scores (T9), nats^-1; None unless a probe
            `needs_loss_coefficients`.
        kept: this rank's share of the update, until the next completions have been drawn; None unless a probe has
            asked for it by [`keep_update`].
        probe_batch: what the entropy probe has measured the step on; None before, and when the next step has begun.
    """

    step: int
    rollouts: RolloutBatch
    learning_rate: float = math.nan
    loss_coefficients: LossCoefficients | None = None
    kept: KeptUpdate | None = None
    probe_batch: ScoredCompletions | None = None

    def keep_update(self, update: UpdateContext, parts: bool = False) -> None:
        """
        Have this rank's share of the update kept. Call it in `on_before_update`, on all ranks.

        Args:
            parts: also keep what splits the step into its parts (T5).
        """
        if self.kept is None or (parts and self.kept.before is None):
            self.kept = KeptUpdate.of(update, parts)

    def take(self, update: UpdateContext) -> None:
        """Note how the step was corrected, when no probe changes it any more."""
        if self.kept is not None and self.kept.before is not None:
            self.kept.correction = dict(update.correction)

    def forget_update(self) -> None:
        """Let go of what [`keep_update`] kept, and of the probe batch."""
        self.kept = self.probe_batch = None

    # ---- resuming

    def state_dict(self) -> StateDict:
        assert self.kept is not None, "a step whose update is not kept is not measured later"
        images = self.rollouts.pixel_inputs
        return {
            "step": self.step,
            "learning_rate": self.learning_rate,
            "rollouts": {**vars(self.rollouts), "pixel_inputs": images and [dict(row) for row in images.rows]},
            "loss_coefficients": self.loss_coefficients and self.loss_coefficients._asdict(),
            "kept": self.kept.state_dict(),
        }

    @classmethod
    def from_state(cls, state: StateDict, device: Any) -> StepRecord:
        coefficients, rollouts = state["loss_coefficients"], send_to_device(state["rollouts"], device)
        images = rollouts["pixel_inputs"] and PixelInputs(tuple(rollouts["pixel_inputs"]))
        return cls(
            state["step"],
            RolloutBatch(**rollouts | {"pixel_inputs": images}),
            state["learning_rate"],
            coefficients and LossCoefficients(**send_to_device(coefficients, device)),
            KeptUpdate.from_state(state["kept"]),
        )
