"""`Plan`: what the checks and the estimates know about a run."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from trl_entropy.models.loading import is_adapter
from trl_entropy.preflight import memory
from trl_entropy.preflight.hardware import Hardware
from trl_entropy.preflight.launch import Launch
from trl_entropy.preflight.shapes import ModelShape
from trl_entropy.tasks.registry import ASSUMED_PROMPT_LENGTH, task_of

if TYPE_CHECKING:
    from trl import ModelConfig

    from trl_entropy.config.dr_grpo import DrGRPOConfig
    from trl_entropy.tasks.arguments import TaskArguments


@dataclass(frozen=True)
class Plan:
    """
    A planned run: its settings, its launcher and its machine.

    For `trl-entropy sft`, `task` is a `DemonstrationArguments` and `args` an `SFTConfig`; only the checks and the
    report of `fine_tuning.py` take such a plan.

    Attributes:
        shape: None if the shape of the model is not known.
    """

    task: TaskArguments
    args: DrGRPOConfig
    model: ModelConfig
    launch: Launch
    hardware: Hardware
    shape: ModelShape | None

    @property
    def world_size(self) -> int:
        return self.launch.num_processes

    @property
    def engine(self) -> str:
        return self.launch.engine

    @property
    def is_sharded(self) -> bool:
        """Whether the optimizer's state is spread over processes."""
        return self.engine.startswith(("zero", "fsdp"))

    @property
    def is_sliced(self) -> bool:
        """Whether parameters are spread over processes too: ZeRO-3, FSDP2."""
        return memory.shards(self.engine, "weights", self.world_size) > 1

    @property
    def attention(self) -> str:
        return self.model.attn_implementation or "sdpa"

    @property
    def has_adapter(self) -> bool:
        return self.model.use_peft or is_adapter(str(self.model.model_name_or_path))

    @property
    def quantisation(self) -> str:
        return "8bit" if self.model.load_in_8bit else "4bit" if self.model.load_in_4bit else "none"

    @property
    def completions_per_step(self) -> int:
        return self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps * self.world_size

    @property
    def prompts_per_step(self) -> float:
        return self.completions_per_step / self.args.num_generations

    @property
    def generation_rows(self) -> int:
        """The completions that a process generates at once, in training or in an evaluation."""
        rows = self.args.per_device_train_batch_size * self.args.steps_per_generation
        evaluates = self.args.eval_strategy != "no"
        return max(rows, self.args.per_device_eval_batch_size if evaluates else 0)

    @property
    def prompt_length(self) -> int:
        """The largest number of tokens in a prompt."""
        return task_of(self.task).longest_prompt(self.task) or ASSUMED_PROMPT_LENGTH

    @property
    def sequence_length(self) -> int:
        return self.prompt_length + self.args.max_completion_length

    @property
    def num_steps(self) -> int:
        """The optimizer steps of the run by its settings; the dataset may hold fewer problems than they ask for."""
        if self.args.max_steps > 0:
            return self.args.max_steps
        problems = task_of(self.task).num_problems(self.task) * self.args.num_iterations
        return max(1, math.ceil(self.args.num_train_epochs * problems / self.prompts_per_step))

    def every(self, interval: float) -> int:
        """The steps of a setting such as `save_steps`, where a value below 1 is a fraction of the run."""
        return max(1, math.ceil(interval * self.num_steps) if interval < 1 else int(interval))
