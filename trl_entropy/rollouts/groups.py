"""Prompt groups: the group of each row, which groups have different rewards, and the shuffle by whole groups."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from trl.trainer import grpo_trainer


def group_numbers(num_rows: int, num_generations: int, process_index: int, device: torch.device) -> Int[Tensor, " B"]:
    """Number of each local row's prompt group: TRL deals rows in order to the processes, G rows per group."""
    first = process_index * num_rows
    return torch.arange(first, first + num_rows, device=device) // num_generations


def groups_with_different_rewards(rewards: Float[Tensor, " B"], groups: Int[Tensor, " B"]) -> Bool[Tensor, " P"]:
    """
    Which groups have completions of different rewards: only their advantages are not all 0.

    Args:
        rewards: NaN where no function scored the completion, which is then not compared.
        groups: number of each completion's group, from 0 to P - 1.
    """
    scored, num_groups = ~rewards.isnan(), int(groups.max()) + 1
    highest, lowest = (rewards.new_full((num_groups,), sign * torch.inf) for sign in (-1, 1))
    highest.scatter_reduce_(0, groups[scored], rewards[scored], "amax")
    lowest.scatter_reduce_(0, groups[scored], rewards[scored], "amin")
    return highest > lowest


def shuffle_groups(rows: dict[str, Any]) -> dict[str, Any]:
    """
    Permute TRL's generation batch by whole prompt groups (runs of equal `prompt_index`), rows of a group in order.

    Args:
        rows: TRL's batch; tensors and lists are permuted along their first axis, 0-d tensors and None stay.
    """
    _, run_lengths = torch.unique_consecutive(rows["prompt_index"], return_counts=True)
    runs = torch.arange(len(rows["prompt_index"])).split(run_lengths.tolist())
    order = torch.cat([runs[i] for i in torch.randperm(len(runs)).tolist()])

    def permute(values: Any) -> Any:
        if values is None or (isinstance(values, Tensor) and values.ndim == 0):
            return values
        return values[order.to(values.device)] if isinstance(values, Tensor) else [values[i] for i in order.tolist()]

    return {name: permute(values) for name, values in rows.items()}


@contextlib.contextmanager
def whole_group_shuffling() -> Iterator[None]:
    """
    Make TRL's `_prepare_inputs` shuffle whole groups, by replacing the function `shuffle_sequence_dict` of its module.

    TRL shuffles single completions, which scatters a group over micro-batches; the gradient of a micro-batch is then
    not a sum over independent groups. Written against trl 1.16; `tests/contracts` tests the assumption.
    """
    original = grpo_trainer.shuffle_sequence_dict
    grpo_trainer.shuffle_sequence_dict = shuffle_groups
    try:
        yield
    finally:
        grpo_trainer.shuffle_sequence_dict = original


def group_max_lengths(all_lengths: Int[Tensor, " N"], num_generations: int) -> Int[Tensor, " N"]:
    """
    Length of the longest completion in each row's group, in tokens: L_i of (T2) for `length_normalizer="group_max"`.

    Args:
        all_lengths: completion lengths of all processes in rank order, as a group may be split over processes.
        num_generations: number of completions of a group, G.

    Returns:
        At least 1: a group of which every completion is masked (`mask_truncated_completions`) has no token whose loss
        could be scaled.
    """
    longest = all_lengths.view(-1, num_generations).amax(dim=1).clamp(min=1)
    return longest.repeat_interleave(num_generations)


def first_groups(prompt_index: Int[Tensor, " B"], num_rows: int) -> Int[Tensor, " N"]:
    """The first `num_rows` rows, ordered by the number of their prompt group."""
    return prompt_index.argsort(stable=True)[:num_rows]
