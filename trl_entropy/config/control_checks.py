"""What the settings of `entropy_control` and `token_control` must be; each refusal says what to change."""

from __future__ import annotations

import logging

from trl_entropy.config.requirements import Requirements
from trl_entropy.config.setting import default_of
from trl_entropy.runs.counted import counted

logger = logging.getLogger(__name__)

# Losses by token that clip each token's ratio, as the published loss of Clip-Cov does.
TOKEN_CLIPPED_LOSSES = ("dr_grpo", "bnpo", "grpo", "dapo")


class ControlChecks(Requirements):
    """The part of [`~trl_entropy.DrGRPOConfig`] that checks what changes the step, before any model is loaded."""

    def _check_controls(self) -> None:
        if self.token_control != "none":
            self._check_token_control()
        if self.entropy_control != "none":
            self._check_entropy_control()

    def controls_tokens_of(self, scope: str) -> bool:
        """Whether `token_control` is on, and `scope` is where it chooses tokens."""
        return self.token_control != "none" and self.token_control_scope == scope

    # ---- entropy control

    def _check_entropy_control(self) -> None:
        """Raises `ValueError` unless there is one thing to hold, by one metric."""
        what = f"entropy_control={self.entropy_control!r}"
        remedies = self._step_with_a_rule() | self._what_to_hold() | self._completions_of_control()
        if needed := [remedy for remedy, holds in remedies.items() if not holds]:
            raise ValueError(f"{what}: set {'; '.join(needed)}.")
        if self.entropy_control_completions == "rollouts":
            self._check_groups_of_a_step(what, "entropy_control_completions='probe'")

    def _what_to_hold(self) -> dict[str, bool]:
        """Setting -> whether it holds."""
        given = [value is not None for value in (self.entropy_control_target, self.entropy_control_per_step)]
        remedies = {
            "either entropy_control_target or entropy_control_per_step, in nats per token": (
                sum(given) == 1 or (self.entropy_control == "report" and sum(given) < 2)
            ),
            "entropy_control_target above 0": (self.entropy_control_target or 1) > 0,
            "entropy_control_gain above 0": self.entropy_control_gain > 0,
        }
        if self.entropy_control in ("floor", "hold"):  # these predict from the optimizer's step alone
            remedies["entropy_second_order=False"] = not self.entropy_second_order
            remedies["fisher_probe=False"] = not self.fisher_probe
        return remedies

    def _completions_of_control(self) -> dict[str, bool]:
        """Setting -> whether it holds."""
        prompts, world = self.entropy_control_num_completions, self.world_size
        of_step = self.entropy_control_completions == "rollouts"
        remedies = {
            "entropy_control_gradient_ema in [0, 1)": 0 <= self.entropy_control_gradient_ema < 1,
            f"entropy_control_num_completions to a multiple of 2 x {counted(world, 'process')}, at least 4 on each": (
                of_step or (prompts >= 4 * world and prompts % (2 * world) == 0)
            ),
        }
        if of_step:
            on_policy = self._on_policy_dr_grpo()
            remedies |= {
                name: on_policy[name] for name in on_policy if name.startswith(("num_iter", "steps_per", "vllm"))
            }
        return remedies

    # ---- token control

    def _check_token_control(self) -> None:
        """Raises `ValueError` unless the tokens can be chosen where they are to be, by numbers that make sense."""
        of_step = self.token_control_scope == "optimizer_batch"
        remedies = {
            "token_control_fraction in (0, 1]": 0 < self.token_control_fraction <= 1,
            "token_control_bounds to a lower and a higher number, with token_control_quantiles in [0, 1]": (
                self._token_bounds_hold()
            ),
            f"steps_per_generation={self.gradient_accumulation_steps} (a generation is one step's)": (
                self.steps_per_generation == self.gradient_accumulation_steps or not of_step
            ),
            f"loss_type to one of {', '.join(TOKEN_CLIPPED_LOSSES)}": (
                of_step or self.loss_type in TOKEN_CLIPPED_LOSSES
            ),
            "importance_sampling_level='token'": of_step or self.importance_sampling_level == "token",
            "no token_control_bounds and no token_control_quantiles (token_control_choice='largest' reads neither)": (
                self.token_control_choice == "random" or not self._names_bounds()
            ),
            "loss_type='dr_grpo' or 'bnpo'": self.token_control != "kl_cov" or self.loss_type in ("dr_grpo", "bnpo"),
        }
        if self.token_control == "exchange":
            remedies |= self._exchange()
        if needed := [remedy for remedy, holds in remedies.items() if not holds]:
            raise ValueError(f"token_control={self.token_control!r}: set {'; '.join(needed)}.")
        if self.token_control == "kl_cov":
            self._warn_of_kl_cov_on_policy()

    def _exchange(self) -> dict[str, bool]:
        """What (T24) needs: setting -> whether it holds."""
        if self.deepspeed_plugin is not None or self.fsdp_version is not None:
            raise ValueError(
                "token_control='exchange' differentiates whole parameters while a step's completions are drawn, and "
                "DeepSpeed and FSDP spread them over processes. Train with one process or DDP, or use another "
                "token_control."
            )
        floor = self.token_control_floor
        return {
            "token_control_floor to an entropy above 0": floor is not None and floor > 0,
            "token_control_gradient_ema in [0, 1)": 0 <= self.token_control_gradient_ema < 1,
            "token_control_scope='optimizer_batch'": self.token_control_scope == "optimizer_batch",
            **self._step_with_a_rule(),
            **self._on_policy_dr_grpo(),
        }

    def _names_bounds(self) -> bool:
        names = "token_control_bounds", "token_control_quantiles"
        return any(getattr(self, name) != default_of(self, name) for name in names)

    def _token_bounds_hold(self) -> bool:
        bounds = self.token_control_bounds
        if len(bounds) != 2 or not bounds[0] < bounds[1]:
            return False
        return not self.token_control_quantiles or (bounds[0] >= 0 and bounds[1] <= 1)

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
