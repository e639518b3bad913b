"""What the settings of a run must be for a probe's equation to hold; each refusal says what to change."""

from __future__ import annotations

from trl_entropy.config.quantities import DEFAULT_QUANTITIES, check_change_of
from trl_entropy.config.requirements import Requirements
from trl_entropy.runs.counted import counted

# Probes whose equations need completions drawn from the policy's own, full distribution (theory.md, Notation), unless
# they draw their own, which they do from it.
FULL_SUPPORT_PROBES = ("entropy_probe", "fisher_probe", "mutual_information_probe")
# Losses that are a sum over completions, the number of tokens by which some divide it taken as given (theory.md, T14).
SUMMED_LOSSES = ("dr_grpo", "grpo", "sapo", "luspo", "dapo", "bnpo", "cispo", "vespo")


class ProbeChecks(Requirements):
    """
    The part of [`~trl_entropy.DrGRPOConfig`] that checks its probes, before any model is loaded.

    A probe that is passed in `callbacks` calls the public ones when training begins.
    """

    def _check_probes(self) -> None:
        if self.kl_every and self.beta == 0 and self.deepspeed_plugin and self.deepspeed_plugin.zero_stage == 3:
            raise ValueError(
                "kl_every puts the start policy's parameters into the model, which ZeRO-3 splits over processes. Set "
                "kl_every=0, or train with zero_stage: 2 (launch/zero2.yaml)."
            )
        if self.kl_every and self.beta == 0 and self.fsdp_version is not None:
            raise ValueError(
                "kl_every puts the start policy's parameters into the model, which FSDP splits over processes. Set "
                "kl_every=0, or train with DDP or zero_stage: 2 (launch/zero2.yaml)."
            )
        if self.entropy_probe:
            self._check_entropy_probe()
        if self.noise_scale_probe:
            self._check_noise_scale()
        if self.fisher_probe:
            self.check_fisher_probe(self.fisher_num_sequences)
        if self.mutual_information_probe:
            self.check_mutual_information(self.mutual_information_num_prompts)

    def _probes_of_full_support(self) -> list[str]:
        names = [name for name in self.enabled_probes() if name in FULL_SUPPORT_PROBES]
        drawn = self.entropy_probe_completions in ("held_out", "eval") and self.entropy_probe_sampler == "model"
        return [name for name in names if name != "entropy_probe" or not drawn]

    # ---- entropy

    def _check_entropy_probe(self) -> None:
        check_change_of(self.change_of)
        if self.entropy_probe_sampler == "vllm" and not self.use_vllm:
            raise ValueError(
                "entropy_probe_sampler='vllm' needs use_vllm=True. Set that, or entropy_probe_sampler='model'."
            )
        if self.entropy_probe_completions == "rollouts":
            return self.check_rollouts_source()
        if self.entropy_attribution != "none":
            self.check_attribution()
        if self.reward_attribution and "reward" not in (self.change_of or DEFAULT_QUANTITIES):
            raise ValueError(
                f"reward_attribution splits the change of the reward, and change_of is {list(self.change_of or ())}. "
                "Add reward to change_of, or set reward_attribution=False."
            )
        if self.entropy_probe_completions == "next_rollouts":
            return self.check_next_rollouts(self.num_entropy_completions())
        self._check_probe_batch()
        if self.entropy_second_order and not all(self._step_of_adamw().values()):
            raise ValueError(
                "entropy_second_order plans the step by AdamW's equation (T4), but optim is "
                f"{self._optimizer_name()}. Set optim='adamw_torch_fused', or entropy_second_order=False."
            )

    def num_entropy_completions(self) -> int:
        """Completions of all processes that the entropy probe measures on, where they are independent of the step."""
        if self.entropy_probe_num_completions is not None:
            return self.entropy_probe_num_completions
        if self.entropy_probe_completions != "next_rollouts":
            return 64
        group, world, rows = int(self.num_generations or 1), self.world_size, self._rows_of_step()
        if rows % group:
            return world * rows
        groups = max(4, -(-rows * world // (4 * group)))
        return min(-(-groups // world) * group, rows) * world

    def _rows_of_step(self) -> int:
        """Completions of one process in a step."""
        return int(self.per_device_train_batch_size * self.gradient_accumulation_steps)

    def check_next_rollouts(self, number: int) -> None:
        """
        Raises `ValueError` unless the next step's completions are independent of a step, and `number` of them are
        whole groups on each process: see `NextRolloutsProbe`.
        """
        what = "entropy_probe_completions='next_rollouts'"
        otherwise = "entropy_probe_completions='held_out'"
        accumulation, generation = self.gradient_accumulation_steps, self.steps_per_generation
        remedies = {
            "num_iterations=1 (else steps share completions)": self.num_iterations == 1,
            "entropy_second_order=False (it is predicted before the step)": not self.entropy_second_order,
            f"steps_per_generation={accumulation} (else later steps get groups chosen by their rewards)": (
                not self.resample_uninformative_groups or accumulation % generation == 0
            ),
        }
        if accumulation % generation:  # steps share a generation, and so must not share what rewards are compared in
            remedies |= {
                f"per_device_train_batch_size={self.num_generations} (else steps share prompt groups)": (
                    self._rows_of_step() % self.num_generations == 0
                ),
                "scale_rewards='none' (else steps share its standard deviation)": self.scale_rewards != "batch",
            }
        needs = f"{what} measures a step on completions of the next one, which must not depend on it"
        self._check_settings(remedies, needs, otherwise)
        self._check_num_prompts_of_a_step(what, otherwise, least=2)
        unit, rows = self.world_size * self.num_generations, self._rows_of_step()
        whole = self.world_size * rows
        if number == whole:
            return
        if rows % self.num_generations:
            raise ValueError(
                f"{what} takes {number} of a step's {whole} completions in whole prompt groups, but a process has "
                f"{rows}, no multiple of num_generations={self.num_generations}. Set "
                f"entropy_probe_num_completions={whole}, all of them, or {otherwise}."
            )
        if number % unit or not 2 * self.num_generations <= number <= whole:
            fitting = min(max(number // unit, -(-4 // self.world_size)) * unit, whole)
            raise ValueError(
                f"entropy_probe_num_completions is {number}: with {what} it must be a multiple of {unit} "
                f"({self.world_size} process(es) x num_generations={self.num_generations}), of at least 2 prompts, "
                f"and at most the {whole} completions of a step. Try entropy_probe_num_completions={fitting}."
            )

    def _check_probe_batch(self) -> None:
        prompts, world = self.num_entropy_completions(), self.world_size
        if prompts < 4 * world or prompts % world:
            fitting = max(4, round(prompts / world)) * world
            raise ValueError(
                f"entropy_probe_num_completions is {prompts}: it must be a multiple of the "
                f"{counted(world, 'process')}, and "
                "at least 4 on each, so that both halves of the completions have a standard error. Try "
                f"entropy_probe_num_completions={fitting}."
            )

    def check_attribution(self) -> None:
        """Raises `ValueError` unless the step is AdamW's, and predicted to first order."""
        if self.entropy_prediction == "none":
            raise ValueError(
                "entropy_attribution splits the first-order prediction (T9), and entropy_prediction='none' makes "
                "none. Set entropy_prediction='linear', or entropy_attribution='none'."
            )
        if not all(self._step_of_adamw().values()):
            raise ValueError(
                f"entropy_attribution splits a step of AdamW (T9), but optim is {self._optimizer_name()}. Set "
                "optim='adamw_torch_fused', or entropy_attribution='none'."
            )

    def check_rollouts_source(self) -> None:
        """Raises `ValueError` unless (T17) holds on the step's own completions: see `RolloutEntropyProbe`."""
        what = "entropy_probe_completions='rollouts'"
        remedies = {
            **self._step_of_adamw(),
            "entropy_second_order=False": not self.entropy_second_order,
            "entropy_placebo=False": not self.entropy_placebo,
            "entropy_attribution='none'": self.entropy_attribution == "none",
            **self._on_policy(),
            **self._sum_over_groups(),
        }
        self._check_settings(
            remedies,
            f"{what} needs an on-policy step of AdamW whose loss is a sum over prompt groups, and makes no prediction "
            "beside (T17)",
            "entropy_probe_completions='held_out'",
        )
        self._check_groups_of_a_step(what, "entropy_probe_completions='held_out'")

    def _sum_over_groups(self) -> dict[str, bool]:
        """What makes a step's gradient a sum over independent prompt groups: setting -> whether it holds."""
        return {
            f"loss_type to one of {', '.join(SUMMED_LOSSES)}": self.loss_type in SUMMED_LOSSES,
            "top_entropy_quantile=1": self.top_entropy_quantile == 1,
            # Groups that were kept though uninformative are left out, which holds where they have no gradient.
            "beta=0, entropy_coef=0, use_adaptive_entropy=False (or resample_uninformative_groups=False)": (
                self._no_other_terms() or not self.resample_uninformative_groups
            ),
        }

    # ---- noise scale

    def _check_noise_scale(self) -> None:
        self.check_noise_scale_probe()
        if self.noise_scale_from == "micro_batches":
            self.check_noise_scale_micro_batches(self.noise_scale_within_prompt)
        elif self.noise_scale_within_prompt:
            self.check_noise_scale_within_prompt()

    def check_noise_scale_probe(self) -> None:
        """Raises `ValueError` unless the gradient is a sum over prompt groups that are independent: (T14)."""
        remedies = {
            "scale_rewards='none'": self.scale_rewards in ("none", "group"),
            "num_iterations=1": self.num_iterations == 1,
            "token_control other than 'kl_cov'": self.token_control != "kl_cov",
            "use_liger_kernel=False": not self.use_liger_kernel,
            **self._sum_over_groups(),
        }
        needs = "noise_scale_probe needs a gradient that is a sum over prompt groups, each used in one step"
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
                f"has {counted(world, 'process')} x {counted(self.gradient_accumulation_steps, 'micro-batch')} of "
                f"{counted(size, 'completion')} "
                f"in groups of num_generations={group}. Try per_device_train_batch_size={n * group} with "
                f"gradient_accumulation_steps={max(per_process, groups_of_process // n)}, or "
                "noise_scale_from='groups'."
            )
        remedies = {
            "noise_scale_within_prompt=False": not halves,
            "resample_uninformative_groups=False": not self.resample_uninformative_groups,
            "fp16=False": not self.fp16,
        }
        needs = (
            "noise_scale_from='micro_batches' compares norms of gradients, which must not be scaled and must each "
            "come from the same number of prompt groups"
        )
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

    # ---- Fisher kernel

    def check_fisher_probe(self, number: int) -> None:
        """Raises `ValueError` unless (T12) is that of an on-policy step of AdamW, on `number` rows of whole groups."""
        needs = "fisher_probe needs an on-policy step of AdamW"
        self._check_settings({**self._step_of_adamw(), **self._on_policy()}, needs, "turn the probe off")
        self._check_groups_of_a_step("fisher_probe", "turn the probe off")
        unit = self.world_size * self.num_generations
        largest = self.world_size * self.per_device_train_batch_size * self.gradient_accumulation_steps // unit * unit
        if number % unit or not 3 * self.num_generations <= number <= largest:
            least = -(-3 // self.world_size) * unit
            fitting = min(max(number // unit * unit, least), largest)
            raise ValueError(
                f"fisher_num_sequences is {number}: it must be a multiple of {unit} "
                f"({counted(self.world_size, 'process')} x "
                f"num_generations={self.num_generations}) of at least 3 prompt groups and at most the {largest} "
                f"completions of a step. Try fisher_num_sequences={fitting}."
            )

    # ---- mutual information

    def check_mutual_information(self, number: int) -> None:
        """Raises `ValueError` unless a step has `number` whole prompt groups that are chosen by nothing (T23)."""
        chosen_by_nothing = {"resample_uninformative_groups=False": not self.resample_uninformative_groups}
        needs = "mutual_information_probe needs completions that are not chosen by their rewards"
        self._check_settings(chosen_by_nothing, needs, "turn the probe off")
        self._check_groups_of_a_step("mutual_information_probe", "turn the probe off")
        rows = self.per_device_train_batch_size * self.gradient_accumulation_steps
        largest = self.world_size * (rows // self.num_generations)
        if number % self.world_size or not 3 <= number <= largest:
            least = -(-3 // self.world_size) * self.world_size
            fitting = min(max(number // self.world_size * self.world_size, least), largest)
            raise ValueError(
                f"mutual_information_num_prompts is {number}: it must be a multiple of the "
                f"{counted(self.world_size, 'process')}, at least 3 and at most the {largest} prompts of a step. Try "
                f"mutual_information_num_prompts={fitting}."
            )
