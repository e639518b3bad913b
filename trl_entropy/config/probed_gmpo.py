"""`ProbedGMPOConfig`, apart from the others as TRL warns of what is experimental when it is imported."""

from __future__ import annotations

from dataclasses import dataclass

from trl.experimental.gmpo import GMPOConfig

from trl_entropy.config.probed import OwnLoss, ProbedConfig


@dataclass
class ProbedGMPOConfig(OwnLoss, ProbedConfig, GMPOConfig):
    """[`~trl.experimental.gmpo.GMPOConfig`] with the probes' settings."""

    trainer_loss = "GMPOTrainer"

    def kl_correction(self) -> str | None:
        return None  # GMPO's loss does not read use_bias_correction_kl

    def _check_terms(self) -> None:
        if self.entropy_coef or self.use_adaptive_entropy:
            raise ValueError(
                "entropy_coef and use_adaptive_entropy are not read by GMPOTrainer's loss, which has no entropy "
                "bonus. Leave them out."
            )
