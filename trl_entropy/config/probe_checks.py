"""What the settings of a run must be for a probe's equation to hold; each refusal says what to change."""

from __future__ import annotations

import logging

from trl import GRPOConfig

logger = logging.getLogger(__name__)

# Probes whose equations need completions drawn from the policy's own, full distribution (theory.md, Notation).
FULL_SUPPORT_PROBES = ("entropy_probe", "fisher_probe")
# Losses that are the same sum over completions whatever the others are: no division by the batch's tokens.
SEPARABLE_LOSSES = ("dr_grpo", "grpo", "sapo")
ENTROPY_PROBE_SAMPLERS = ("model", "vllm")
ENTROPY_PROBE_COMPLETIONS = ("held_out", "eval", "rollouts")
ENTROPY_ATTRIBUTIONS = ("none", "sequence", "token")
ENTROPY_CONTROLS = ("none", "report", "floor", "hold")
ENTROPY_CONTROL_COMPLETIONS = ("probe", "rollouts")
NOISE_SCALE_SOURCES = ("groups", "micro_batches")
TOKEN_CONTROLS = ("none", "clip_cov", "kl_cov", "random", "random_positive")
TOKEN_CONTROL_SCOPES = ("optimizer_batch", "micro_batch")
# Losses by token that clip each token's ratio, as the published loss of Clip-Cov does.
TOKEN_CLIPPED_LOSSES = ("dr_grpo", "bnpo", "grpo", "dapo")


class ProbeRequirements(GRPOConfig):
    """
    The part of [`~trl_entropy.DrGRPOConfig`] that checks its probes, before any model is loaded.

    A probe that is passed in `callbacks` calls the public ones when training begins.
    """

    def _check_probes(self) -> None:
        if self.kl_every and self.beta == 0 and self.deepspeed_plugin and self.deepspeed_plugin.zero_stage == 3:
            raise ValueError(
                "kl_every puts the start policy's parameters into the model, which ZeRO-3 keeps in parts. Set "
                "kl_every=0, or train with zero_stage: 2 (launch/zero2.yaml)."
            )
        for name in self.enabled_probes():
            if getattr(self, f"{name}_every") < 1:
                raise ValueError(f"{name}_every is {getattr(self, f'{name}_every')}; use 1 or more steps.")
        if self.entropy_probe:
            self._check_entropy_probe()
        if self.noise_scale_probe:
            self.check_noise_scale_probe()
            if self.noise_scale_from not in NOISE_SCALE_SOURCES:
                raise ValueError(f"noise_scale_from is {self.noise_scale_from!r}; use one of {NOISE_SCALE_SOURCES}.")
            if self.noise_scale_from == "micro_batches":
                self.check_noise_scale_micro_batches(self.noise_scale_within_prompt)
            elif self.noise_scale_within_prompt:
                self.check_noise_scale_within_prompt()
        if self.fisher_probe:
            self.check_fisher_probe(self.fisher_num_sequences)
        sensitive = [name for name in self.enabled_probes() if name in FULL_SUPPORT_PROBES]
        if self.token_control != "none":
            self._check_token_control()
        if self.entropy_control != "none":
            self._check_entropy_control()
            sensitive.append("entropy_control")
        if not sensitive:
            return
        if truncation := self.truncated_sampling():
            raise ValueError(
                f"{', '.join(sensitive)}: the estimators hold for completions drawn from the policy's full "
                f"distribution, but {truncation} changes it. Set top_k=0, top_p=1, min_p=None, repetition_penalty=1, "
                "or turn the probe off."
            )
        if self.mask_truncated_completions:
            raise ValueError(
                f"{', '.join(sensitive)}: mask_truncated_completions=True drops completions by their outcome, which "
                "biases every estimator. Set mask_truncated_completions=False, or turn the probe off."
            )

    def _check_entropy_probe(self) -> None:
        if self.entropy_probe_completions not in ENTROPY_PROBE_COMPLETIONS:
            raise ValueError(
                f"entropy_probe_completions is {self.entropy_probe_completions!r}; "
                f"use one of {ENTROPY_PROBE_COMPLETIONS}."
            )
        if self.entropy_probe_sampler not in ENTROPY_PROBE_SAMPLERS:
            raise ValueError(
                f"entropy_probe_sampler is {self.entropy_probe_sampler!r}; use one of {ENTROPY_PROBE_SAMPLERS}."
            )
        if self.entropy_probe_sampler == "vllm" and not self.use_vllm:
            raise ValueError("entropy_probe_sampler='vllm' needs use_vllm=True. Set that, or leave it at 'model'.")
        if self.entropy_attribution not in ENTROPY_ATTRIBUTIONS:
            raise ValueError(
                f"entropy_attribution is {self.entropy_attribution!r}; use one of {ENTROPY_ATTRIBUTIONS}."
            )
        if self.entropy_probe_completions == "rollouts":
            return self.check_rollouts_source()
        if self.entropy_attribution != "none":
            self.check_attribution()
        prompts, world = self.entropy_probe_num_completions, self.world_size
        if prompts < 4 * world or prompts % world:
            fitting = max(4, round(prompts / world)) * world
            raise ValueError(
                f"entropy_probe_num_completions is {prompts}: it must be a multiple of the {world} process(es), at "
                f"least 4 each, for a standard error on each half. Try entropy_probe_num_completions={fitting}."
            )
        optimizer = str(getattr(self.optim, "value", self.optim))
        if self.entropy_second_order and "adamw" not in optimizer:
            raise ValueError(
                f"entropy_second_order plans the step by AdamW's equation (T4), optim is {optimizer}. Set "
                "optim='adamw_torch_fused', or entropy_second_order=False."
            )

    def _check_entropy_control(self) -> None:
        """Raises `ValueError` unless there is one thing to hold, by one metric."""
        what, prompts, world = (
            f"entropy_control={self.entropy_control!r}",
            self.entropy_control_num_completions,
            self.world_size,
        )
        optimizer = str(getattr(self.optim, "value", self.optim))
        given = [value is not None for value in (self.entropy_control_target, self.entropy_control_per_step)]
        positive = ("gain", "max_change", "cap")
        remedies = {
            f"entropy_control to one of {ENTROPY_CONTROLS}": self.entropy_control in ENTROPY_CONTROLS,
            f"entropy_control_completions to one of {ENTROPY_CONTROL_COMPLETIONS}": (
                self.entropy_control_completions in ENTROPY_CONTROL_COMPLETIONS
            ),
            "optim='adamw_torch_fused'": "adamw" in optimizer,
            "either entropy_control_target or entropy_control_per_step, nats per token": (
                sum(given) == 1 or (self.entropy_control == "report" and sum(given) < 2)
            ),
            "entropy_control_target above 0": (self.entropy_control_target or 1) > 0,
            "entropy_control_gain, _max_change and _cap above 0, _integral_gain and _metric_floor 0 or more": (
                all(getattr(self, f"entropy_control_{name}") > 0 for name in positive)
                and min(self.entropy_control_integral_gain, self.entropy_control_metric_floor) >= 0
            ),
            "entropy_control_gradient_ema in [0, 1)": 0 <= self.entropy_control_gradient_ema < 1,
            f"entropy_control_num_completions to a multiple of 2 x {world} process(es), 4 each or more": (
                self.entropy_control_completions == "rollouts" or (prompts >= 4 * world and prompts % (2 * world) == 0)
            ),
        }
        if self.entropy_control in ("floor", "hold"):  # these predict from the optimizer's step alone
            remedies["entropy_second_order=False"] = not self.entropy_second_order
            remedies["fisher_probe=False"] = not self.fisher_probe
        if self.entropy_control_completions == "rollouts":
            on_policy = self._on_policy_dr_grpo()
            remedies |= {
                name: on_policy[name] for name in on_policy if name.startswith(("num_iter", "steps_per", "vllm"))
            }
        if needed := [remedy for remedy, holds in remedies.items() if not holds]:
            raise ValueError(f"{what}: set {'; '.join(needed)}.")
        if self.entropy_control_completions == "rollouts":
            self._check_groups_of_a_step(what, "entropy_control_completions='probe'")

    def controls_tokens_of(self, scope: str) -> bool:
        """Whether `token_control` is on, and `scope` is where it chooses tokens."""
        return self.token_control != "none" and self.token_control_scope == scope

    def _check_token_control(self) -> None:
        """Raises `ValueError` unless the tokens can be chosen where they are to be, by numbers that make sense."""
        bounds, of_step = self.token_control_bounds, self.token_control_scope == "optimizer_batch"
        highest = 1.0 if self.token_control_quantiles else float("inf")
        remedies = {
            f"token_control to one of {TOKEN_CONTROLS}": self.token_control in TOKEN_CONTROLS,
            f"token_control_scope to one of {TOKEN_CONTROL_SCOPES}": self.token_control_scope in TOKEN_CONTROL_SCOPES,
            "token_control_fraction in (0, 1]": 0 < self.token_control_fraction <= 1,
            "token_control_bounds to a lower and a higher number, with token_control_quantiles in [0, 1]": (
                len(bounds) == 2 and bounds[0] < bounds[1] <= highest and (bounds[0] >= 0 or highest > 1)
            ),
            f"steps_per_generation={self.gradient_accumulation_steps} (a generation is one step's)": (
                self.steps_per_generation == self.gradient_accumulation_steps or not of_step
            ),
            f"loss_type to one of {TOKEN_CLIPPED_LOSSES}": of_step or self.loss_type in TOKEN_CLIPPED_LOSSES,
            "importance_sampling_level='token'": of_step or self.importance_sampling_level == "token",
            "loss_type='dr_grpo' or 'bnpo'": self.token_control != "kl_cov" or self.loss_type in ("dr_grpo", "bnpo"),
        }
        if needed := [remedy for remedy, holds in remedies.items() if not holds]:
            raise ValueError(f"token_control={self.token_control!r}: set {'; '.join(needed)}.")
        if self.token_control == "kl_cov":
            self._warn_of_kl_cov_on_policy()

    def _warn_of_kl_cov_on_policy(self) -> None:
        """Where TRL does not clip either: the steps on a generation all come before the update."""
        accumulation, generation = self.gradient_accumulation_steps, self.steps_per_generation
        if accumulation % (generation * self.num_iterations):
            return
        scored_twice = self.use_vllm and self.vllm_importance_sampling_correction
        logger.warning(
            "token_control='kl_cov' %s, in both scopes: with num_iterations=%d and steps_per_generation=%d a step's "
            "policy is the one that sampled, where the gradient of |log-ratio| is 0. Set num_iterations above %d, or "
            "use 'clip_cov'.",
            "follows only the sign of rounding errors (vLLM's old scores)" if scored_twice else "does nothing",
            self.num_iterations, generation, accumulation // generation,
        )  # fmt: skip

    def check_attribution(self) -> None:
        """Raises `ValueError` unless the step is AdamW's."""
        optimizer = str(getattr(self.optim, "value", self.optim))
        if "adamw" not in optimizer:
            raise ValueError(
                f"entropy_attribution splits AdamW's step (T9), optim is {optimizer}. Set optim='adamw_torch_fused', "
                "or entropy_attribution='none'."
            )

    def check_rollouts_source(self) -> None:
        """Raises `ValueError` unless (T17) holds on the step's own completions: see `RolloutEntropyProbe`."""
        what, optimizer = "entropy_probe_completions='rollouts'", str(getattr(self.optim, "value", self.optim))
        remedies = {
            "optim='adamw_torch_fused'": "adamw" in optimizer,
            "entropy_second_order=False": not self.entropy_second_order,
            "entropy_placebo=False": not self.entropy_placebo,
            "entropy_attribution='none'": self.entropy_attribution == "none",
        }
        self._check_settings(
            remedies | self._on_policy_dr_grpo(),
            f"{what} needs a step of AdamW by the on-policy Dr-GRPO loss (T2) alone, and has no other prediction than "
            "(T17)",
            "entropy_probe_completions='held_out'",
        )
        self._check_groups_of_a_step(what, "entropy_probe_completions='held_out'")

    def check_dr_grpo_step(self, what: str) -> None:
        """Raises `ValueError` unless a step's gradient is that of the on-policy Dr-GRPO loss (T2) alone."""
        needs = f"{what} needs a step of the on-policy Dr-GRPO loss (T2) alone"
        self._check_settings(self._on_policy_dr_grpo(), needs, "turn the probe off")

    def check_noise_scale_probe(self) -> None:
        """Raises `ValueError` unless the gradient is a sum over prompt groups that are independent: (T14)."""
        remedies = {
            "loss_type='dr_grpo'": self.loss_type in SEPARABLE_LOSSES,
            "scale_rewards='none'": self.scale_rewards in ("none", "group"),
            "num_iterations=1": self.num_iterations == 1,
            "token_control other than 'kl_cov'": self.token_control != "kl_cov",
            "entropy_coef=0": self.entropy_coef == 0,
            "use_adaptive_entropy=False": not self.use_adaptive_entropy,
            "top_entropy_quantile=1": self.top_entropy_quantile == 1,
            "use_liger_kernel=False": not self.use_liger_kernel,
            # Groups that were kept though uninformative are left out, which holds where they have no gradient.
            "beta=0": self.beta == 0 or not self.resample_uninformative_groups,
        }
        needs = "noise_scale_probe needs a gradient that is a sum over prompt groups, each seen once"
        self._check_settings(remedies, needs, "turn the probe off")
        self._check_groups_of_a_step("noise_scale_probe", "turn the probe off")

    def check_noise_scale_micro_batches(self, halves: bool) -> None:
        """Raises `ValueError` unless a step has two micro-batches or more, each of whole groups: (T15)."""
        size, group, world = self.per_device_train_batch_size, self.num_generations, self.world_size
        groups_of_process = size * self.gradient_accumulation_steps // group
        per_process = 2 if world == 1 else 1
        if size % group or world * self.gradient_accumulation_steps < 2:
            fitting = [n for n in range(1, groups_of_process + 1) if groups_of_process % n == 0]
            n = max([n for n in fitting if groups_of_process // n >= per_process and n * group <= size] or [1])
            raise ValueError(
                "noise_scale_from='micro_batches' needs two micro-batches a step, each of whole prompt groups: a step "
                f"has {world} process(es) x {self.gradient_accumulation_steps} micro-batch(es) of {size} completions "
                f"in groups of num_generations={group}. Try per_device_train_batch_size={n * group} with "
                f"gradient_accumulation_steps={max(per_process, groups_of_process // n)}, or "
                "noise_scale_from='groups'."
            )
        remedies = {
            "noise_scale_within_prompt=False": not halves,
            "resample_uninformative_groups=False": not self.resample_uninformative_groups,
            "fp16=False": not self.fp16,
        }
        needs = "noise_scale_from='micro_batches' knows norms of unscaled gradients of the same number of groups alone"
        self._check_settings(remedies, needs, "noise_scale_from='groups'")

    def check_noise_scale_within_prompt(self) -> None:
        """Raises `ValueError` unless the halves of a group can have advantages of their own: (T14), last line."""
        remedies = {
            "scale_rewards='none'": self.scale_rewards == "none",
            "length_normalizer='max_completion_length'": self.length_normalizer == "max_completion_length",
            "num_generations=4": (self.num_generations or 0) >= 4,
            **self._on_policy_dr_grpo(),
        }
        needs = "noise_scale_within_prompt needs centred, unscaled advantages in the on-policy Dr-GRPO loss (T2)"
        self._check_settings(remedies, needs, "noise_scale_within_prompt=False")

    def check_fisher_probe(self, number: int) -> None:
        """Raises `ValueError` unless (T12) is that of an on-policy step of AdamW, on `number` rows of whole groups."""
        optimizer = str(getattr(self.optim, "value", self.optim))
        remedies = {
            "optim='adamw_torch_fused'": "adamw" in optimizer,
            "token_control='none'": self.token_control == "none",
            **self._on_policy_dr_grpo(),
        }
        needs = "fisher_probe needs a step of AdamW by the on-policy Dr-GRPO loss (T2) alone"
        self._check_settings(remedies, needs, "turn the probe off")
        self._check_groups_of_a_step("fisher_probe", "turn the probe off")
        if self.fisher_sketch_dim < 0:
            raise ValueError(
                f"fisher_sketch_dim is {self.fisher_sketch_dim}; use 0 (exact) or a number of dimensions."
            )
        unit = self.world_size * self.num_generations
        largest = self.world_size * self.per_device_train_batch_size * self.gradient_accumulation_steps // unit * unit
        if number % unit or not 3 * self.num_generations <= number <= largest:
            least = -(-3 // self.world_size) * unit
            fitting = min(max(number // unit * unit, least), largest)
            raise ValueError(
                f"fisher_num_sequences is {number}: it must be a multiple of {unit} ({self.world_size} process(es) x "
                f"num_generations={self.num_generations}) of at least 3 prompt groups and at most the {largest} "
                f"completions of a step. Try fisher_num_sequences={fitting}."
            )

    @staticmethod
    def _check_settings(remedies: dict[str, bool], needs: str, otherwise: str) -> None:
        if needed := [setting for setting, holds in remedies.items() if not holds]:
            raise ValueError(f"{needs}. Set {', '.join(needed)}, or {otherwise}.")

    def _on_policy_dr_grpo(self) -> dict[str, bool]:
        """What makes the step's loss (T2) at ratio 1 and nothing else: setting -> whether it holds."""
        accumulation, generation = self.gradient_accumulation_steps, self.steps_per_generation
        return {
            "loss_type='dr_grpo'": self.loss_type == "dr_grpo",
            "beta=0": self.beta == 0,
            "num_iterations=1": self.num_iterations == 1,
            f"steps_per_generation={accumulation} (a step uses whole generations)": accumulation % generation == 0,
            "entropy_coef=0": self.entropy_coef == 0,
            "use_adaptive_entropy=False": not self.use_adaptive_entropy,
            "vllm_importance_sampling_correction=False": not (
                self.use_vllm and self.vllm_importance_sampling_correction
            ),
            "top_entropy_quantile=1": self.top_entropy_quantile == 1,
            "off_policy_mask_threshold=None": self.off_policy_mask_threshold is None,
        }

    def _check_groups_of_a_step(self, what: str, otherwise: str) -> None:
        """Whole prompt groups in every process's part of a step, and enough of them for standard errors."""
        for steps in (self.steps_per_generation, self.gradient_accumulation_steps):
            if self.per_device_train_batch_size * steps % self.num_generations:
                below = self.per_device_train_batch_size // self.num_generations * self.num_generations
                raise ValueError(
                    f"{what} needs each prompt group on one process and in one step, but "
                    f"per_device_train_batch_size={self.per_device_train_batch_size} x {steps} "
                    f"step(s) splits groups of num_generations={self.num_generations}. Try "
                    f"per_device_train_batch_size={below + self.num_generations}, a multiple of num_generations."
                )
        rows = self.per_device_train_batch_size * self.gradient_accumulation_steps
        num_prompts = self.world_size * rows // self.num_generations
        if num_prompts < 4:
            raise ValueError(
                f"{what} needs at least 4 prompts a step for its standard error, this step has {num_prompts}. "
                f"Set num_prompts_per_step=4 or more, or {otherwise}."
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

    def truncated_sampling(self) -> str:
        """The sampling settings that keep tokens from being drawn with the policy's probability; empty if none."""
        full = {"top_k": (0, None), "top_p": (1.0, None), "min_p": (None, 0.0), "repetition_penalty": (1.0, None)}
        extra = self.generation_kwargs or {}
        found = {name: extra.get(name, getattr(self, name)) for name in full}
        narrowed = {name: value for name, value in found.items() if value not in full[name]}
        known = {*full, "stop", "stop_strings", "include_stop_str_in_output", "max_tokens", "seed"}
        narrowed |= {name: value for name, value in extra.items() if name not in known}
        return ", ".join(f"{name}={value}" for name, value in narrowed.items())
