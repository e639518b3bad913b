"""`DrGRPOConfig`: TRL's `GRPOConfig` with the Dr-GRPO defaults, the probes' toggles, and one early check."""

from __future__ import annotations

import logging
import math
import os
from dataclasses import dataclass, field

from trl import GRPOConfig

from trl_entropy.config.bf16 import explaining_bf16
from trl_entropy.config.control_checks import ControlChecks
from trl_entropy.config.number_checks import NumberChecks
from trl_entropy.config.probe_checks import ProbeChecks
from trl_entropy.config.prompt_checks import PromptChecks
from trl_entropy.config.unread import check_config
from trl_entropy.config.without_secrets import WithoutSecrets
from trl_entropy.runs.counted import counted
from trl_entropy.runs.evaluated import terms_of
from trl_entropy.tasks.r1_template import ANSWER_CLOSE

logger = logging.getLogger(__name__)


@dataclass
class DrGRPOConfig(WithoutSecrets, ProbeChecks, ControlChecks, PromptChecks, NumberChecks, GRPOConfig):
    """
    Arguments of [`DrGRPOTrainer`]: those of [`~trl.GRPOConfig`], four of them with other defaults, and this package's.

    The latter are declared in `training_settings.py`, `probe_settings.py` and `control_settings.py`. docs/toggles.md
    lists them all, and `trl-entropy train --help` prints them.

    Raises:
        ValueError: for settings that do not go together, saying what to change; before any model is loaded.
    """

    # TRL's fields, with this package's defaults.
    loss_type: str = field(default="dr_grpo", metadata={"help": "The loss of a step; see TRL's GRPOConfig."})
    scale_rewards: str = field(
        default="none",
        metadata={
            "help": "Divide advantages by the standard deviation of the rewards of the prompt's group (group) or of "
            "the whole batch (batch), or not at all (none)."
        },
    )
    logging_steps: float = field(
        default=1,
        metadata={
            "help": "Number of optimizer steps between two log lines of trackers and callbacks. metrics.jsonl has a "
            "line for each step."
        },
    )
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Leave losses that are NaN or infinite out of the logs."}
    )

    def __post_init__(self) -> None:
        world_size = int(os.environ.get("WORLD_SIZE", "1"))
        self._check_choices()
        check_config(self)
        self._check_numbers()
        self._check_group_size()
        self._set_accumulation(world_size)
        self._check_divisibility(world_size)
        if self.stop_at_answer and self.use_vllm:  # without vLLM the trainer stops the model's own generate
            stop = {"stop": [ANSWER_CLOSE], "include_stop_str_in_output": True}
            self.generation_kwargs: dict | None = {**stop, **(self.generation_kwargs or {})}
        with explaining_bf16():
            super().__post_init__()
        self._check_processes(world_size)
        self._check_loss()
        self._check_sampler()
        self._check_resampling()
        self._check_length_and_evaluation()
        self._check_probes()
        self._check_controls()
        on_rollouts = self.entropy_control != "none" and self.entropy_control_completions == "rollouts"
        controlled = ["entropy_control"] if on_rollouts else []
        controlled += ["token_control='exchange'"] if self.token_control == "exchange" else []
        self.check_full_distribution(self._probes_of_full_support() + controlled)

    def _check_processes(self, world_size: int) -> None:
        if self.world_size != world_size:
            raise ValueError(
                f"WORLD_SIZE is {world_size} but {self.world_size} processes take part; batch sizes were checked for "
                "the former. Start with `accelerate launch` or `torchrun`."
            )

    def _check_group_size(self) -> None:
        if self.num_generations is None or self.num_generations < 2:
            raise ValueError(
                f"num_generations is {self.num_generations}; a group of at least 2 completions is needed, since the "
                "advantage is the reward minus its group's mean. Set num_generations to 2 or more (8 is usual)."
            )

    def _set_accumulation(self, world_size: int) -> None:
        """Derive `gradient_accumulation_steps` from `num_prompts_per_step`."""
        if self.num_prompts_per_step is None:
            return
        completions = self.num_prompts_per_step * self.num_generations
        per_micro_step = world_size * self.per_device_train_batch_size
        if completions <= 0 or completions % per_micro_step:
            fitting = _divisors_near(completions // world_size, self.per_device_train_batch_size, self.num_generations)
            multiple = math.lcm(per_micro_step, self.num_generations) // self.num_generations
            raise ValueError(
                f"num_prompts_per_step={self.num_prompts_per_step} x num_generations={self.num_generations} = "
                f"{completions} completions a step do not divide into {counted(world_size, 'process')} x "
                f"per_device_train_batch_size={self.per_device_train_batch_size}. "
                + _proposal("per_device_train_batch_size", fitting, f"num_prompts_per_step a multiple of {multiple}")
            )
        steps = completions // per_micro_step
        if self.gradient_accumulation_steps not in (1, steps):
            raise ValueError(
                f"num_prompts_per_step={self.num_prompts_per_step} needs gradient_accumulation_steps={steps} "
                f"({completions} completions / {counted(world_size, 'process')} / "
                f"{self.per_device_train_batch_size} a "
                f"micro-batch), got {self.gradient_accumulation_steps}. Remove one of the two settings."
            )
        self.gradient_accumulation_steps: int = steps
        logger.info("num_prompts_per_step=%d: gradient_accumulation_steps set to %d", self.num_prompts_per_step, steps)

    def _check_divisibility(self, world_size: int) -> None:
        """The generation batch holds whole groups (TRL's rule, checked earlier and with a proposal)."""
        if self.generation_batch_size is not None:
            return  # TRL checks it against the rest
        steps = self.steps_per_generation or self.gradient_accumulation_steps
        batch = world_size * self.per_device_train_batch_size * steps
        if batch % self.num_generations:
            above = -(-batch // self.num_generations) * self.num_generations
            fitting = [size for size in range(1, above + 1) if (world_size * steps * size) % self.num_generations == 0]
            nearest = sorted(fitting, key=lambda size: abs(size - self.per_device_train_batch_size))[:2]
            raise ValueError(
                f"{counted(world_size, 'process')} x per_device_train_batch_size={self.per_device_train_batch_size} x "
                f"{counted(steps, 'step')} = {batch} completions hold no whole number of groups of num_generations="
                f"{self.num_generations}. "
                + _proposal("per_device_train_batch_size", sorted(nearest), f"num_generations a divisor of {batch}")
            )

    def _check_loss(self) -> None:
        if self.length_normalizer == "group_max" and self.loss_type != "dr_grpo":
            raise ValueError(
                f"length_normalizer='group_max' rescales the Dr-GRPO loss (T2) and means nothing for loss_type="
                f"{self.loss_type!r}. Set loss_type='dr_grpo' or length_normalizer='max_completion_length'."
            )

    def _check_length_and_evaluation(self) -> None:
        if self.additional_steps < 0 or (self.additional_steps and not self.resume_from_checkpoint):
            raise ValueError(
                f"additional_steps is {self.additional_steps}: it counts steps beyond a checkpoint. Set "
                "resume_from_checkpoint='latest' with it, or max_steps instead of it."
            )
        if self.keep_best is not None:
            try:
                terms_of(self.keep_best)
            except ValueError as error:
                raise ValueError(f"keep_best: {error}.") from error
        if self.evaluate_checkpoints != "none" and self.save_strategy == "no":
            raise ValueError(
                f"evaluate_checkpoints={self.evaluate_checkpoints!r} evaluates what is saved, and save_strategy='no' "
                "saves nothing. Set save_strategy='steps' and save_steps, or evaluate_checkpoints='none'."
            )

    def _check_sampler(self) -> None:
        if self.use_transformers_continuous_batching and self.bf16:
            raise ValueError(
                "use_transformers_continuous_batching=True with bf16=True casts the trained float32 weights to "
                "bfloat16 in place at the first rollout; at small learning rates almost none of them moves after "
                "that. Set use_transformers_continuous_batching=False or bf16=False."
            )
        if self.stop_at_answer and self.mask_truncated_completions:
            raise ValueError(
                "stop_at_answer=True ends completions without an end token, and mask_truncated_completions=True would "
                "mask them all as truncated. Turn one of the two off."
            )


def _divisors_near(total: int, wanted: int, group: int, num: int = 2) -> list[int]:
    """Divisors of `total` nearest to `wanted`, those that hold whole groups first."""
    divisors = [size for size in range(1, total + 1) if total % size == 0]
    whole = [size for size in divisors if size % group == 0]
    return sorted(sorted(whole or divisors, key=lambda size: abs(size - wanted))[:num])


def _proposal(field_name: str, values: list[int], otherwise: str) -> str:
    if not values:
        return f"Make {otherwise}."
    return f"Try {field_name}={' or '.join(map(str, values))}, or make {otherwise}."
