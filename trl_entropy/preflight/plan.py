"""`Plan`: everything that the checks and the estimates look at."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trl_entropy.models.loading import is_adapter
from trl_entropy.preflight.hardware import Hardware
from trl_entropy.preflight.launch import Launch
from trl_entropy.preflight.shapes import ModelShape

if TYPE_CHECKING:
    from trl import ModelConfig

    from trl_entropy.config.dr_grpo import DrGRPOConfig

# The word problems are shorter than what `max_prompt_length` allows; no tokenizer is run to know by how much.
ASSUMED_PROMPT_LENGTH = 200


@dataclass(frozen=True)
class Plan:
    """A run as its settings, its launcher and its machine make it; `shape` is None when the model is not known."""

    task: Any
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
        """Completions that a process draws at once: those of a whole generation, or of an evaluation batch."""
        rows = self.args.per_device_train_batch_size * self.args.steps_per_generation
        evaluates = self.args.eval_strategy != "no"
        return max(rows, self.args.per_device_eval_batch_size if evaluates else 0)

    @property
    def prompt_length(self) -> int:
        """Tokens, at most."""
        return self.task.max_prompt_length if self.task.task == "gsm8k" else ASSUMED_PROMPT_LENGTH

    @property
    def sequence_length(self) -> int:
        return self.prompt_length + self.args.max_completion_length

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the run, by its settings: the dataset may hold fewer problems than it asks for."""
        if self.args.max_steps > 0:
            return self.args.max_steps
        problems = self.task.num_train_problems * self.args.num_iterations
        return max(1, math.ceil(self.args.num_train_epochs * problems / self.prompts_per_step))

    def every(self, interval: float) -> int:
        """Steps between two events of a setting such as `save_steps`, which below 1 is a share of the run."""
        return max(1, math.ceil(interval * self.num_steps) if interval < 1 else int(interval))
