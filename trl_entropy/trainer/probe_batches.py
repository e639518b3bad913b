"""`ProbeBatches`: draws probe batches with the trainer's own generation, without changing the course of training."""

from __future__ import annotations

import contextlib
from typing import Any

from datasets import Dataset
from torch.utils.data import ConcatDataset
from trl import GRPOTrainer

from trl_entropy.engine.parameters import evaluation_mode
from trl_entropy.rollouts.completions import Completions
from trl_entropy.rollouts.drawing import draw_prompts, own_randomness, pack_completions
from trl_entropy.rollouts.generation import generating_with_the_model
from trl_entropy.trainer.step_prompts import StepPrompts


class ProbeBatches:
    """
    The trainer's [`~trl_entropy.rollouts.drawing.ProbeBatchSampler`]. A draw does not change training's random state,
    the order of its prompts, or its metrics.

    Written against trl 1.16, whose `_tokenize_prompts` and `_generate_single_turn` it calls.

    Args:
        trainer: the trainer whose policy, datasets and generation are used.
        step_prompts: the prompts of the present step, which a draw of held-out prompts leaves out.
    """

    def __init__(self, trainer: GRPOTrainer, step_prompts: StepPrompts) -> None:
        self._trainer, self._step_prompts = trainer, step_prompts

    def draw(self, num_prompts: int, source: str, step: int, sampler: str = "model") -> Completions:
        """See [`~trl_entropy.rollouts.drawing.ProbeBatchSampler`]."""
        trainer = self._trainer
        dataset = trainer.train_dataset if source == "held_out" else trainer.eval_dataset
        if isinstance(dataset, dict):  # all sets together: rows are drawn by number, and their columns may differ
            dataset = ConcatDataset(list(dataset.values()))
        exclude = self._step_prompts.all() if source == "held_out" else set()
        rank, share = trainer.accelerator.process_index, num_prompts // trainer.accelerator.num_processes
        seed = trainer.args.seed
        prompts = draw_prompts(dataset, num_prompts, exclude, (seed, step))[rank * share : (rank + 1) * share]
        own_sampler = generating_with_the_model(trainer) if sampler == "model" else contextlib.nullcontext()
        with own_sampler:
            return self.draw_completions(prompts, (seed, step, rank), rank * share)

    def check_alike(self) -> None:
        """See [`~trl_entropy.rollouts.drawing.ProbeBatchSampler`]."""
        trainer = self._trainer
        own = {"tools": trainer.tools, "environments": trainer.environments, "a rollout_func": trainer.rollout_func}
        if names := [name for name, given in own.items() if given]:
            raise ValueError(
                f"training's completions are made with {' and '.join(names)}, and those of a probe are not"
            )
        dataset = trainer.train_dataset
        if not isinstance(dataset, Dataset) or "prompt" not in dataset.column_names:
            raise ValueError(
                "the dataset is streamed or has no column of prompts, so that none can be drawn by number"
            )

    def draw_completions(self, prompts: list[Any], seed: tuple[int, ...], first_prompt: int = 0) -> Completions:
        """One completion of each prompt, numbered from `first_prompt`, by the trainer's present generation. Local."""
        trainer, device = self._trainer, self._trainer.accelerator.device
        model = trainer.accelerator.unwrap_model(trainer.model)
        with own_randomness(seed, device), evaluation_mode(model):  # the policy that is scored has no dropout
            prompt_ids, images, fields = trainer._tokenize_prompts(prompts)
            completion_ids, logps = trainer._generate_single_turn(prompt_ids, images, fields, 1)
        return pack_completions(
            prompt_ids, completion_ids, first_prompt, trainer._tokenizer.pad_token_id, device, logps
        )
