"""What several checks ask of the settings of a run; each refusal says what to change."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING

from trl_entropy.config.control_settings import ControlSettings
from trl_entropy.config.probe_settings import ProbeSettings
from trl_entropy.config.sampling import merged, narrowing, narrowing_arguments
from trl_entropy.config.setting import own_settings
from trl_entropy.config.training_settings import TrainingSettings
from trl_entropy.estimators.optimizer.known import SPLIT, SPLIT_IN_SLICES, why_none
from trl_entropy.runs.counted import counted

if TYPE_CHECKING:
    from trl import GRPOConfig as _TrlConfig
else:
    _TrlConfig = object

# Trainers with a loss of their own that is a mean over completions of what is computed of each alone.
SUMMED_LOSSES_OF_TRAINERS = ("GMPOTrainer", "RLOOTrainer")


class Requirements(ControlSettings, ProbeSettings, TrainingSettings, _TrlConfig):
    """
    All settings, and the questions that the checks of probes, controls and prompts share. The configuration that they
    are of derives from one of TRL's too.

    Attributes:
        trainer_loss: what the loss is called where a trainer has one of its own, and does not read `loss_type`.
    """

    trainer_loss = ""

    def _loss(self) -> str:
        return self.trainer_loss or str(self.loss_type)

    def _check_choices(self) -> None:
        for name, described in own_settings(self).items():
            value = getattr(self, name)
            if described.choices and value not in described.choices:
                raise ValueError(f"{name} is {value!r}; use one of {', '.join(described.choices)}.")

    @staticmethod
    def _check_settings(remedies: dict[str, bool], needs: str, otherwise: str) -> None:
        if needed := [setting for setting, holds in remedies.items() if not holds]:
            raise ValueError(f"{needs}. Set {', '.join(needed)}, or {otherwise}.")

    @property
    def fsdp_version(self) -> int | None:
        """1 or 2, as the arguments or `accelerate launch` ask for; `None` without FSDP."""
        if self.fsdp_plugin_args is not None:
            return int(self.fsdp_plugin_args.get("fsdp_version") or 1)
        asked = os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("1", "true")
        return int(os.environ.get("FSDP_VERSION", "1")) if asked else None

    def _optimizer_name(self) -> str:
        return str(getattr(self.optim, "value", self.optim))

    def _step_with_a_rule(self) -> dict[str, bool]:
        """What makes the step one that can be split (T5): setting -> whether it holds."""
        name, setting = self._optimizer_name(), "optim='adamw_torch_fused'"
        if name not in SPLIT:
            return {f"{setting} (of {name}: {why_none(name)})": False}
        sliced = self.deepspeed_plugin is not None or self.fsdp_version is not None
        if sliced and name not in SPLIT_IN_SLICES:
            return {f"{setting} (DeepSpeed and FSDP spread the state of {name} over processes)": False}
        return {setting: True}

    def _on_policy(self) -> dict[str, bool]:
        """What makes a step's completions draws of the policy that it starts from: setting -> whether it holds."""
        accumulation, generation = self.gradient_accumulation_steps, self.steps_per_generation
        return {
            "num_iterations=1": self.num_iterations == 1,
            f"steps_per_generation={accumulation} (a step uses whole generations)": accumulation % generation == 0,
        }

    def _on_policy_dr_grpo(self) -> dict[str, bool]:
        """What makes the step's loss (T2) at ratio 1 and nothing else: setting -> whether it holds."""
        return {
            "loss_type='dr_grpo'": self._loss() == "dr_grpo",
            "beta=0": self.beta == 0,
            **self._on_policy(),
            "entropy_coef=0": self.entropy_coef == 0,
            "use_adaptive_entropy=False": not self.use_adaptive_entropy,
            "vllm_importance_sampling_correction=False": not (
                self.use_vllm and self.vllm_importance_sampling_correction
            ),
            "top_entropy_quantile=1": self.top_entropy_quantile == 1,
            "off_policy_mask_threshold=None": self.off_policy_mask_threshold is None,
        }

    def _no_other_terms(self) -> bool:
        """Whether the loss has neither a KL term nor an entropy bonus."""
        return self.beta == 0 and self.entropy_coef == 0 and not self.use_adaptive_entropy

    def kl_correction(self) -> str | None:
        """The level of the ratio by which the loss weighs its KL term; None if it does not."""
        return str(self.importance_sampling_level) if self.use_bias_correction_kl else None

    def weighs_tokens_alike(self) -> bool:
        """Whether on-policy all tokens of a completion have the same coefficient -dLoss/dS_ik, as far as is known."""
        by_token = self.use_vllm and self.vllm_importance_sampling_correction
        by_token = by_token and self.vllm_importance_sampling_mode.startswith("token")
        chosen = self.token_control != "none" or self.top_entropy_quantile < 1
        is_known = not self.trainer_loss or self.trainer_loss in SUMMED_LOSSES_OF_TRAINERS
        return is_known and self._no_other_terms() and not by_token and not chosen

    def _check_groups_of_a_step(self, what: str, otherwise: str) -> None:
        """Whole prompt groups in every process's part of a step, and enough of them for standard errors."""
        for steps in (self.steps_per_generation, self.gradient_accumulation_steps):
            if self.per_device_train_batch_size * steps % self.num_generations:
                below = self.per_device_train_batch_size // self.num_generations * self.num_generations
                raise ValueError(
                    f"{what} needs all completions of a prompt on one process and in one step, but "
                    f"per_device_train_batch_size={self.per_device_train_batch_size} x "
                    f"{counted(steps, 'step')} splits groups of num_generations={self.num_generations}. Try "
                    f"per_device_train_batch_size={below + self.num_generations}, a multiple of num_generations."
                )
        self._check_num_prompts_of_a_step(what, otherwise)

    def _check_num_prompts_of_a_step(self, what: str, otherwise: str, least: int = 4) -> None:
        rows = self.per_device_train_batch_size * self.gradient_accumulation_steps
        num_prompts = self.world_size * rows // self.num_generations
        if num_prompts < least:
            raise ValueError(
                f"{what} needs at least {least} prompts a step for its standard error, this step has {num_prompts}. "
                f"Set num_prompts_per_step={least} or more, or {otherwise}."
            )

    def check_full_distribution(self, names: list[str], of_model: Mapping[str, object] | None = None) -> None:
        """
        Check that completions are drawn from the policy's own distribution, and that all are kept.

        Args:
            names: the probes that need this; with none nothing is checked.
            of_model: the model's own `generation_config`; see [`truncated_sampling`].

        Raises:
            ValueError: naming the setting.
        """
        if not names:
            return
        if truncation := self.truncated_sampling(of_model):
            of_run = self.truncated_sampling()
            whose = "" if of_run else " of the model's generation_config"
            remedy = "Set top_k=0, top_p=1, min_p=None, repetition_penalty=1"
            if not of_run:
                remedy = "Set it to None there, or to a neutral value in generation_kwargs ({'typical_p': 1.0})"
            raise ValueError(
                f"{', '.join(names)}: the estimators hold for completions drawn from the policy's full distribution, "
                f"but {truncation}{whose} changes it. {remedy}, or turn the probe off."
            )
        if self.mask_truncated_completions:
            raise ValueError(
                f"{', '.join(names)}: mask_truncated_completions=True drops completions by their outcome, which "
                "biases every estimator. Set mask_truncated_completions=False, or turn the probe off."
            )

    def rollouts_are_the_policys(self) -> bool:
        """Whether a step's completions are draws of the policy that it starts from, on prompts chosen by nothing."""
        fresh = self.num_iterations == 1 and self.gradient_accumulation_steps % self.steps_per_generation == 0
        return fresh and not self.use_vllm and self.distribution_of_rollouts() == "all prompts"

    def distribution_of_rollouts(self) -> str:
        """Which prompts, and which of their groups, a step's completions are of, in words for the probes' files."""
        groups = "accepted groups" if self.resample_uninformative_groups else "all prompts"
        return groups if self.curriculum == "none" else f"{groups}, drawn by {self.curriculum}"

    def enabled_probes(self) -> list[str]:
        """Names of the probes that are turned on."""
        return [name for name in self.__dataclass_fields__ if name.endswith("_probe") and getattr(self, name)]

    def truncated_sampling(self, of_model: Mapping[str, object] | None = None) -> str:
        """
        The sampling settings that keep tokens from being drawn with the policy's probability; empty if none.

        Args:
            of_model: the model's own `generation_config`, from which transformers takes every setting that is None,
                before its own default (top_k=50).
        """
        own = {name: getattr(self, name) for name in ("top_k", "top_p", "min_p", "repetition_penalty")}
        extra = self.generation_kwargs or {}
        found = narrowing(merged(of_model or {}, own, extra)) | narrowing_arguments(extra)
        if self.use_vllm and self.vllm_structured_outputs_regex is not None:
            found["vllm_structured_outputs_regex"] = self.vllm_structured_outputs_regex
        return ", ".join(f"{name}={value}" for name, value in found.items())
