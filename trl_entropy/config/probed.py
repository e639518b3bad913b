"""
`ProbedConfig`: the probes' settings for any of TRL's trainers that `ProbedTrainer` extends; `ProbedRLOOConfig`.

Written against trl 1.16.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from trl import RLOOConfig

from trl_entropy.config.bf16 import explaining_bf16
from trl_entropy.config.control_settings import ControlSettings
from trl_entropy.config.number_checks import NumberChecks
from trl_entropy.config.probe_checks import ProbeChecks
from trl_entropy.config.setting import default_of
from trl_entropy.config.training_settings import TrainingSettings
from trl_entropy.config.unread import check_config
from trl_entropy.config.without_secrets import WithoutSecrets


@dataclass
class ProbedConfig(WithoutSecrets, ProbeChecks, NumberChecks):
    """
    The probes' settings, to be put before a configuration of TRL:

        @dataclass
        class MyConfig(ProbedConfig, MyGRPOConfig): ...

    What changes training (`entropy_control`, `curriculum`, `length_normalizer` and the like) is `DrGRPOTrainer`'s.

    Raises:
        ValueError: for settings that do not go together, saying what to change; before any model is loaded.
    """

    def __post_init__(self) -> None:
        self._check_choices()
        self._check_not_of_dr_grpo()
        check_config(self)
        self._check_numbers()
        with explaining_bf16():
            super().__post_init__()
        self._check_terms()
        self._check_probes()
        self.check_full_distribution(self._probes_of_full_support())

    def _check_not_of_dr_grpo(self) -> None:
        for one in (*fields(ControlSettings), *fields(TrainingSettings)):
            if getattr(self, one.name) != default_of(self, one.name):
                raise ValueError(
                    f"{one.name} is {getattr(self, one.name)!r}: it changes training or the run's files, which is for "
                    "DrGRPOTrainer. A ProbedTrainer has the settings of probes. Leave it out."
                )

    def _check_terms(self) -> None:
        """Refuse what a trainer's loss makes untrue; a subclass says what."""


class OwnLoss:
    """Of a trainer whose loss is not (T2) at any setting."""

    trainer_loss = ""

    def check_noise_scale_within_prompt(self) -> None:
        """Raises `ValueError`: halves of a group have no advantages of their own in this loss."""
        raise ValueError(
            "noise_scale_within_prompt needs centred, unscaled advantages in the on-policy Dr-GRPO loss (T2), and "
            f"{self.trainer_loss} has a loss of its own. Set noise_scale_within_prompt=False."
        )


@dataclass
class ProbedRLOOConfig(OwnLoss, ProbedConfig, RLOOConfig):
    """[`~trl.RLOOConfig`] with the probes' settings."""

    trainer_loss = "RLOOTrainer"
    # What RLOO's loss has none of, in the words of GRPOConfig that checks ask for. Its KL is a part of the reward.
    loss_type = "rloo"
    entropy_coef, use_adaptive_entropy = 0.0, False
    top_entropy_quantile, off_policy_mask_threshold = 1.0, None
    vllm_importance_sampling_correction = False

    @property
    def scale_rewards(self) -> str:
        """As of `GRPOConfig`: whether advantages are divided by a standard deviation of the whole batch."""
        return "batch" if self.normalize_advantages else "none"

    def _no_other_terms(self) -> bool:
        return True

    def kl_correction(self) -> str | None:
        return None

    def _check_terms(self) -> None:
        if self.use_vllm:
            raise ValueError(
                "use_vllm=True: RLOOTrainer keeps no log-probabilities of vLLM, by which a probe would weigh its "
                "completions. Set use_vllm=False, or use a trainer that derives from GRPOTrainer."
            )
        if self.normalize_advantages and (self.noise_scale_probe or self.entropy_probe_completions == "rollouts"):
            raise ValueError(
                "normalize_advantages=True divides by a standard deviation over all prompts, so that the gradient is "
                "no sum over independent prompt groups. Set normalize_advantages=False, or turn noise_scale_probe and "
                "entropy_probe_completions='rollouts' off."
            )
