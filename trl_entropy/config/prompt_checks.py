"""What the settings that choose prompts must be: the curriculum, and groups that are replaced."""

from __future__ import annotations

from typing import Any

from trl import GRPOConfig

CURRICULA = ("none", "pass_rate")


class SelectionRequirements(GRPOConfig):
    """The part of [`~trl_entropy.DrGRPOConfig`] that checks how prompts are selected, before any model is loaded."""

    def _check_curriculum(self) -> None:
        weights = self.curriculum_settings()["weights"]
        remedies = {
            f"curriculum to one of {CURRICULA}": self.curriculum in CURRICULA,
            "0 <= curriculum_hard_below <= curriculum_easy_above <= 1": (
                0 <= self.curriculum_hard_below <= self.curriculum_easy_above <= 1
            ),
            "curriculum_ema in (0, 1]": 0 < self.curriculum_ema <= 1,
            "the three curriculum weights to 0 or more, one of them above 0": min(weights) >= 0 < max(weights),
        }
        if needed := [remedy for remedy, holds in remedies.items() if not holds]:
            raise ValueError(f"curriculum={self.curriculum!r}: set {'; '.join(needed)}.")

    def _check_resampling(self) -> None:
        if not self.resample_uninformative_groups:
            return
        remedies = {
            "max_resample_rounds=1 or more": self.max_resample_rounds >= 1,
            "scale_rewards='none' or 'group'": self.scale_rewards != "batch",
            "multi_objective_aggregation='sum_then_normalize'": (
                self.multi_objective_aggregation == "sum_then_normalize"
            ),
        }
        if needed := [remedy for remedy, holds in remedies.items() if not holds]:
            raise ValueError(
                "resample_uninformative_groups puts groups of several rounds into one batch, so that advantages must "
                f"not depend on the rest of a round: set {', '.join(needed)}, or resample_uninformative_groups=False."
            )

    def curriculum_settings(self) -> dict[str, Any]:
        """Arguments of `PassRateSampler` that are settings."""
        return {
            "hard_below": self.curriculum_hard_below,
            "easy_above": self.curriculum_easy_above,
            "weights": (self.curriculum_hard_weight, self.curriculum_normal_weight, self.curriculum_easy_weight),
            "ema": self.curriculum_ema,
            "seed": self.seed,
        }
