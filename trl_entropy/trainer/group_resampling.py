"""
Other prompt groups in place of those whose rewards are all equal: how many to draw, which to take, their batch.

A round is one call of TRL's `_generate_and_score_completions`: whole groups in order, spread over the processes. What
is informative is known from rewards of all processes, so that all of them choose alike.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any, cast

import torch
from accelerate.utils import gather_object, send_to_device
from jaxtyping import Bool
from torch import Tensor

from trl_entropy.rollouts.batch import GenerationBatch, join_rows

# Round and number of a group or row, in the order of all processes.
Place = tuple[int, int]


@dataclass(frozen=True)
class ScoredRound:
    """
    What a round leaves.

    Attributes:
        batch: TRL's batch, the rows of this process.
        rewards: weighted sums of the reward functions, rows of all processes.
        informative: by group, whether its rewards differ; groups of all processes.
        logs: TRL's tables of completions, rows of all processes.
    """

    batch: GenerationBatch
    rewards: Tensor
    informative: Bool[Tensor, " P"]
    logs: dict[str, Any]


def round_size(num_missing: int, num_informative: int, num_drawn: int, unit: int, most: int) -> int:
    """
    Prompts of the next round: so many that `num_missing` informative groups are expected among them.

    Rounds cost more than rows: each waits for its longest completion. So one round is to do where that can be.

    Args:
        num_informative, num_drawn: groups of the rounds so far.
        unit: prompts whose completions the processes share evenly.
        most: prompts of a whole generation, a multiple of `unit`.
    """
    expected = most if not num_informative else math.ceil(num_missing * num_drawn / num_informative)
    return min(-(-expected // unit) * unit, most)


def chosen_groups(informative: list[Tensor]) -> list[Place]:
    """
    Where each group of the filled batch comes from: the first round's informative ones stay, later rounds' take the
    other places in the order in which they were drawn, and where there are too few the first round's stay after all.

    Nothing but the order decides, so that given their number the accepted groups are independent draws of one law.
    """
    spare = (
        (number, int(group)) for number, of_round in enumerate(informative) if number for group in of_round.nonzero()
    )
    return [(0, n) if keep else next(spare, (0, n)) for n, keep in enumerate(informative[0].tolist())]


def filled_batch(
    rounds: list[ScoredRound], chosen: list[Place], num_generations: int, rank: int, fill: dict[str, int]
) -> GenerationBatch:
    """
    TRL's batch of this process with the chosen groups in place. Collective.

    Args:
        fill: value of padding by the name of a tensor; 0 for others.
    """
    first: dict[str, Any] = {**rounds[0].batch}
    num_rows = _num_rows(rounds[0].batch)
    rows = _rows_of(chosen, num_generations)
    moved = [place for place in rows if place[0]]
    names = [name for name, values in first.items() if isinstance(values, Tensor) and values.ndim]
    parts = _gathered_rows(rounds, moved, rank, names)
    number = {place: num_rows + i for i, place in enumerate(moved)}
    local = rows[rank * num_rows : (rank + 1) * num_rows]
    index = torch.tensor([number[place] if place[0] else place[1] - rank * num_rows for place in local])

    def taken(name: str) -> Tensor:
        device = first[name].device
        joined = join_rows(
            [first[name], *(send_to_device(part[name], device) for part in parts)], name, fill.get(name, 0)
        )
        return joined[index.to(device)]

    return cast(GenerationBatch, first | {name: taken(name) for name in names})


def filled_rewards(rounds: list[ScoredRound], chosen: list[Place], num_generations: int) -> Tensor:
    """Rewards of the filled batch, rows of all processes."""
    return torch.stack([rounds[number].rewards[row] for number, row in _rows_of(chosen, num_generations)])


def filled_logs(rounds: list[ScoredRound], chosen: list[Place], num_generations: int) -> dict[str, Any]:
    """TRL's tables of completions of the filled batch; a column that a round does not have is None there."""
    rows = _rows_of(chosen, num_generations)

    def taken(columns: list[list[Any] | None]) -> list[Any]:
        return [None if (column := columns[number]) is None else column[row] for number, row in rows]

    return {
        name: {key: taken([one.logs[name].get(key) for one in rounds]) for key in table}
        if isinstance(table, dict)
        else taken([one.logs[name] for one in rounds])
        for name, table in rounds[0].logs.items()
    }


def _rows_of(groups: list[Place], num_generations: int) -> list[Place]:
    """Round and row, for every row of the groups."""
    return [(number, group * num_generations + i) for number, group in groups for i in range(num_generations)]


def _num_rows(batch: GenerationBatch) -> int:
    return len(batch["completion_ids"])


def _gathered_rows(
    rounds: list[ScoredRound], places: list[Place], rank: int, names: list[str]
) -> list[dict[str, Tensor]]:
    """The rows at `places`, ascending, from the processes that have them, as parts to join in order. Collective."""
    payload = []
    for number, one in enumerate(rounds):
        num_rows = _num_rows(one.batch)
        begin = rank * num_rows
        local = torch.tensor(
            [row - begin for k, row in places if k == number and begin <= row < begin + num_rows], dtype=torch.long
        )
        batch: dict[str, Any] = {**one.batch}
        payload.append({name: batch[name].cpu()[local] for name in names})
    of_ranks = gather_object([payload])
    return list(itertools.chain.from_iterable(zip(*of_ranks, strict=True)))
