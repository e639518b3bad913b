"""What the settings that choose prompts must be."""

from __future__ import annotations

from trl_entropy.config.requirements import Requirements


class PromptChecks(Requirements):
    """The part of [`~trl_entropy.DrGRPOConfig`] that checks how prompts are selected, before any model is loaded."""

    def _check_resampling(self) -> None:
        if not self.resample_uninformative_groups:
            return
        remedies = {
            "scale_rewards='none' or 'group'": self.scale_rewards != "batch",
            "multi_objective_aggregation='sum_then_normalize'": (
                self.multi_objective_aggregation == "sum_then_normalize"
            ),
        }
        self._check_settings(
            remedies,
            "resample_uninformative_groups puts prompts of several rounds of generation into one batch, so a "
            "completion's advantage must not depend on the other prompts of its round",
            "resample_uninformative_groups=False",
        )
