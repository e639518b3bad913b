"""A checkpoint as a fixed state: policy, sampler, and the one step that AdamW would make from a fresh batch."""

from __future__ import annotations

from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from trl.trainer.utils import split_tensor_dict

from trl_entropy.engine import UpdateContext
from trl_entropy.engine.adamw_step import predicted_update
from trl_entropy.engine.plain import PlainEngine
from trl_entropy.estimators.attribution.shares import on_policy_coefficients
from trl_entropy.experiments.checkpoint import Checkpoint
from trl_entropy.rollouts.batch import RolloutBatch, TrainingBatch
from trl_entropy.rollouts.completions import Completions
from trl_entropy.rollouts.drawing import own_randomness
from trl_entropy.tasks.arguments import load_task
from trl_entropy.tasks.word_problems import MAX_PROBLEMS

# Settings of the run that decide how it samples and steps; all others (logging, saving, probes) are left out.
# fmt: off
_KEPT_SETTINGS = (
    "adam_beta1", "adam_beta2", "adam_epsilon", "beta", "generation_kwargs", "learning_rate", "length_normalizer",
    "loss_type", "max_completion_length", "max_grad_norm", "min_p", "num_generations", "optim", "optim_args",
    "repetition_penalty", "reward_weights", "scale_rewards", "seed", "stop_at_answer", "temperature", "top_k",
    "top_p", "use_cpu", "weight_decay",
)
# fmt: on


class Policy:
    """
    The policy of a checkpoint and its sampler: the run's data, rewards and settings. Loads the model; never trains.

    Args:
        checkpoint: what to load.
        output_dir: where the trainer may write; nothing is written into the run.
        held_out: draw from problems that no run trains on, not from the training problems.
    """

    def __init__(self, checkpoint: Checkpoint, output_dir: Path, held_out: bool = False) -> None:
        self.trainer = _build_trainer(checkpoint, output_dir)
        self.args, self.model = self.trainer.args, self.trainer.model
        self.problems = self.trainer.eval_dataset if held_out else self.trainer.train_dataset
        self.num_problems = len(self.problems)

    def on_held_out(self) -> Policy:
        """The same policy, drawing from problems that no run trains on."""
        other = copy(self)
        other.problems = self.trainer.eval_dataset
        other.num_problems = len(other.problems)
        return other

    def draw_problems(self, num: int, seed: tuple[int, ...]) -> np.ndarray:
        """Rows of the problems, independent of one another: with replacement."""
        return np.random.default_rng(seed).integers(self.num_problems, size=num)

    def draw(self, problems: np.ndarray, seed: tuple[int, ...]) -> Completions:
        """One completion of each problem."""
        prompts = [self.problems[int(row)]["prompt"] for row in problems]
        return self.trainer.probe_batches.draw_completions(prompts, seed)

    def draw_rollouts(self, problems: np.ndarray, num_generations: int, seed: tuple[int, ...]) -> TrainingBatch:
        """TRL's batch of a group of completions for each problem, rewarded; groups follow one another."""
        inputs = [self.problems[int(row)] for row in problems.repeat(num_generations)]
        self.trainer.num_generations = num_generations
        with own_randomness(seed, self.trainer.accelerator.device):
            return self.trainer._generate_and_score_completions(inputs)


class FixedState(Policy):
    """
    A policy and the one step that the run's AdamW would make of it, from a fresh batch. Loads the optimizer too.

    Args:
        checkpoint, output_dir: as for [`Policy`].
        seed: of the update batch.

    Attributes:
        context: the `UpdateContext` before that step.
        rollouts: U, the completions of that step, on-policy under the loss (T2).
        before, after, update: theta before and after it, and their difference in float32, by parameter name.
    """

    def __init__(self, checkpoint: Checkpoint, output_dir: Path, seed: int) -> None:
        super().__init__(checkpoint, output_dir)
        optimizer = self.trainer.create_optimizer()
        optimizer.load_state_dict(torch.load(checkpoint.path / "optimizer.pt", weights_only=True, map_location="cpu"))
        self._take_gradient(checkpoint.num_prompts_per_step, (seed, 0))
        self.engine = PlainEngine(self.trainer.accelerator, self.model, optimizer, self.args.max_grad_norm)
        self.context = UpdateContext(self.engine)
        planned = predicted_update(self.context)
        self.before = self.context.params_before
        self.after = {name: value + planned[name] for name, value in self.before.items()}
        # What float32 makes of the step, so that the direction is that from `before` to `after`.
        self.update = {name: self.after[name] - value for name, value in self.before.items()}

    @property
    def loss_coefficients(self) -> Float[Tensor, "B T"]:
        """alpha_ik of (T9), of U."""
        batch = self.rollouts
        return on_policy_coefficients(
            batch.advantages, batch.completion_mask, len(batch.rewards), self.args.max_completion_length
        )

    def _take_gradient(self, num_prompts: int, seed: tuple[int, ...]) -> None:
        """Draw U without replacement and leave the gradient of TRL's own loss in `.grad`, a group at a time."""
        problems = np.random.default_rng(seed).permutation(self.num_problems)[:num_prompts]
        batch = self.draw_rollouts(problems, self.args.num_generations, seed)
        self.trainer.current_gradient_accumulation_steps = num_prompts
        groups = split_tensor_dict(batch, num_prompts)
        self.rollouts = RolloutBatch.from_micro_batches(groups)
        for group in groups:
            self.trainer.compute_loss(self.model, group).backward()


def _build_trainer(checkpoint: Checkpoint, output_dir: Path) -> Any:
    """A trainer on the checkpoint's weights in float32, with the run's data, rewards and sampler; it never trains."""
    from transformers import AutoTokenizer

    from trl_entropy.config.dr_grpo import DrGRPOConfig
    from trl_entropy.tasks import rewards
    from trl_entropy.trainer.dr_grpo import DrGRPOTrainer

    settings = {name: checkpoint.config[name] for name in _KEPT_SETTINGS if name in checkpoint.config}
    args = DrGRPOConfig(
        output_dir=str(output_dir),
        per_device_train_batch_size=settings["num_generations"],
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        disable_tqdm=True,
        disable_dropout=True,
        model_init_kwargs={"dtype": "float32"},
        **settings,
    )
    if narrowed := args.truncated_sampling():
        raise ValueError(
            f"{checkpoint.path.parent} sampled with {narrowed}; the estimators need the full distribution"
        )
    tokenizer = AutoTokenizer.from_pretrained(checkpoint.path, padding_side="left", truncation_side="left")
    task = replace(checkpoint.task, num_eval_problems=MAX_PROBLEMS["test"])
    train_dataset, eval_dataset = load_task(task, tokenizer, args.seed)
    trainer = DrGRPOTrainer(
        model=str(checkpoint.path),
        reward_funcs=[getattr(rewards, name) for name in checkpoint.task.reward_funcs],
        args=args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=tokenizer,
    )
    trainer.model.train()  # what TRL takes for training, and gives training's group size and loss
    return trainer
