"""`ProbedGMPOConfig`, apart from the others as TRL warns of what is experimental when it is imported."""

from __future__ import annotations

from dataclasses import dataclass

from trl.experimental.gmpo import GMPOConfig

from trl_entropy.config.probed import OwnLoss, ProbedConfig


@dataclass
class ProbedGMPOConfig(OwnLoss, ProbedConfig, GMPOConfig):
    """[`~trl.experimental.gmpo.GMPOConfig`] with the probes' settings."""

    trainer_loss = "GMPOTrainer"

    def _check_terms(self) -> None:
        if self.use_bias_correction_kl and self.beta:
            raise ValueError(
                "use_bias_correction_kl=True is not read by GMPOTrainer's loss, and the split of the change by terms "
                "of the loss (T9) would take it as read. Set use_bias_correction_kl=False."
            )
        if self.entropy_coef or self.use_adaptive_entropy:
            raise ValueError(
                "entropy_coef and use_adaptive_entropy are not read by GMPOTrainer's loss, which has no entropy "
                "bonus. Leave them out."
            )
