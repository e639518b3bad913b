"""A checkpoint as a fixed state: policy, sampler, and the one step that AdamW would make from a fresh batch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from trl_entropy.engine import UpdateContext, evaluation_mode
from trl_entropy.engine.parameters import trainable_parameters
from trl_entropy.engine.plain import PlainEngine
from trl_entropy.estimators.entropy import entropy_and_logps
from trl_entropy.estimators.policy_gradient import group_advantages, policy_gradient_terms
from trl_entropy.experiments.checkpoint import Checkpoint
from trl_entropy.probes.entropy import predicted_update
from trl_entropy.probes.probe_batch import own_randomness, pack_completions
from trl_entropy.rollouts import group_max_lengths
from trl_entropy.scores import Completions
from trl_entropy.train import load_task

# Settings of the run that decide how it samples and steps; all others (logging, saving, probes) are left out.
# fmt: off
_KEPT_SETTINGS = (
    "adam_beta1", "adam_beta2", "adam_epsilon", "beta", "generation_kwargs", "learning_rate", "length_normalizer",
    "loss_type", "max_completion_length", "max_grad_norm", "min_p", "num_generations", "optim", "optim_args",
    "repetition_penalty", "reward_weights", "scale_rewards", "seed", "stop_at_answer", "temperature", "top_k",
    "top_p", "use_cpu", "weight_decay",
)
# fmt: on


class FixedState:
    """
    The policy at a checkpoint, its sampler, and one update of it by (T4). Loads model, data and optimizer.

    Args:
        checkpoint: what to load.
        output_dir: where the trainer may write; nothing is written into the run.
        seed: of the update batch.
    """

    def __init__(self, checkpoint: Checkpoint, output_dir: Path, seed: int) -> None:
        self.trainer = _build_trainer(checkpoint, output_dir)
        self.args, self.model = self.trainer.args, self.trainer.model
        self.num_problems = len(self.trainer.train_dataset)
        optimizer = self.trainer.create_optimizer()
        optimizer.load_state_dict(torch.load(checkpoint.path / "optimizer.pt", weights_only=True, map_location="cpu"))
        self._make_update(optimizer, checkpoint.num_prompts_per_step, (seed, 0))

    def _make_update(self, optimizer: torch.optim.Optimizer, num_prompts: int, seed: tuple[int, ...]) -> None:
        """Draw U, take its gradient, and plan the step."""
        problems = np.random.default_rng(seed).permutation(self.num_problems)[:num_prompts]
        rollouts = self.draw_rollouts(problems, self.args.num_generations, seed)
        parameters = trainable_parameters(self.model)
        total = torch.zeros((), dtype=torch.float64)
        for group in range(num_prompts):
            _, logps, completions = self.forward(rollouts.completions, group)
            total = total + rollouts.loss_terms(logps, completions, group).sum()
        gradient = torch.autograd.grad(total / len(rollouts.completions), list(parameters.values()))
        for parameter, value in zip(parameters.values(), gradient, strict=True):
            parameter.grad = value
        self.engine = PlainEngine(self.trainer.accelerator, self.model, optimizer, self.args.max_grad_norm)
        self.context = UpdateContext(self.engine)
        planned = predicted_update(self.context)
        self.before = self.context.params_before
        self.after = {name: value + planned[name] for name, value in self.before.items()}
        # What float32 makes of the step, so that the direction is that from `before` to `after`.
        self.update = {name: self.after[name] - value for name, value in self.before.items()}

    # ---- sampling

    def draw_problems(self, num: int, seed: tuple[int, ...]) -> np.ndarray:
        """Rows of the training problems, independent of one another: with replacement."""
        return np.random.default_rng(seed).integers(self.num_problems, size=num)

    def draw(self, problems: np.ndarray, seed: tuple[int, ...]) -> tuple[Completions, list[list[int]]]:
        """One completion of each problem from the policy at theta; padded, and as token ids."""
        prompts = [self.trainer.train_dataset[int(row)]["prompt"] for row in problems]
        with own_randomness(seed, self.trainer.accelerator.device):
            prompt_ids, images, extra = self.trainer._tokenize_prompts(prompts)
            completion_ids, _ = self.trainer._generate_single_turn(prompt_ids, images, extra, 1)
        pad, device = self.trainer._tokenizer.pad_token_id, self.trainer.accelerator.device
        return pack_completions(prompt_ids, completion_ids, 0, pad, device), completion_ids

    def draw_rollouts(self, problems: np.ndarray, num_generations: int, seed: tuple[int, ...]) -> Rollouts:
        """A group of completions for each problem, with advantages (T1) and normalisers L_i (T2)."""
        completions, ids = self.draw(problems.repeat(num_generations), seed)
        index = torch.arange(len(problems), device=completions.input_ids.device).repeat_interleave(num_generations)
        rows = [self.trainer.train_dataset[int(row)] for row in problems.repeat(num_generations)]
        texts = self.trainer._tokenizer.batch_decode(ids, skip_special_tokens=True)
        self.trainer._calculate_rewards(rows, [row["prompt"] for row in rows], texts, ids)
        advantages = group_advantages(self.trainer._rewards.float(), num_generations)
        if self.args.length_normalizer == "group_max":
            normalizers = group_max_lengths(completions.lengths, num_generations)
        else:
            normalizers = torch.full_like(index, self.args.max_completion_length)
        return Rollouts(replace(completions, prompt_index=index), advantages, normalizers)

    def forward(
        self, completions: Completions, group: int
    ) -> tuple[Float[Tensor, "G T"], Float[Tensor, "G T"], Completions]:
        """Token entropies and log-probabilities (nats) of one group at theta, with their graph."""
        part = completions.rows(completions.prompt_index == group).trimmed()
        width = part.completion_mask.shape[1]
        with evaluation_mode(self.model):
            logits = self.model(
                input_ids=part.input_ids,
                attention_mask=part.attention_mask,
                use_cache=False,
                logits_to_keep=width + 1,
            ).logits
        return *entropy_and_logps(logits[:, :-1], part.input_ids[:, -width:], self.args.temperature), part


@dataclass(frozen=True)
class Rollouts:
    """Groups of completions with their advantages (B,) and normalisers L_i (B,), in tokens."""

    completions: Completions
    advantages: Float[Tensor, " B"]
    normalizers: Int[Tensor, " B"]

    def loss_terms(self, logps: Float[Tensor, "G T"], part: Completions, group: int) -> Float[Tensor, " G"]:
        """(T2) of one group's completions, whose scores are `logps`."""
        rows = self.completions.prompt_index == group
        return policy_gradient_terms(logps, part.completion_mask, self.advantages[rows], self.normalizers[rows])


def _build_trainer(checkpoint: Checkpoint, output_dir: Path) -> Any:
    """A trainer on the checkpoint's weights in float32, with the run's data, rewards and sampler; it never trains."""
    from transformers import AutoTokenizer

    from trl_entropy import rewards
    from trl_entropy.config import DrGRPOConfig
    from trl_entropy.trainer import DrGRPOTrainer

    settings = {name: checkpoint.config[name] for name in _KEPT_SETTINGS if name in checkpoint.config}
    args = DrGRPOConfig(
        output_dir=str(output_dir),
        per_device_train_batch_size=settings["num_generations"],
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        disable_tqdm=True,
        model_init_kwargs={"dtype": "float32"},
        **settings,
    )
    if narrowed := args.truncated_sampling():
        raise ValueError(
            f"{checkpoint.path.parent} sampled with {narrowed}; the estimators need the full distribution"
        )
    tokenizer = AutoTokenizer.from_pretrained(checkpoint.path, padding_side="left", truncation_side="left")
    train_dataset, _ = load_task(checkpoint.task, tokenizer, args.seed)
    return DrGRPOTrainer(
        model=str(checkpoint.path),
        reward_funcs=[getattr(rewards, name) for name in checkpoint.task.reward_funcs],
        args=args,
        train_dataset=train_dataset,
        processing_class=tokenizer,
    )
