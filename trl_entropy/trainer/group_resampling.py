"""
Replaces prompt groups whose rewards are all equal (uninformative: all advantages are 0) by groups of other prompts:
how many to draw, which of them to take, and the batch that results.

A round is one call of TRL's `_generate_and_score_completions`: whole groups in order, spread over the processes. All
processes know the rewards of all groups, and so make the same choice.
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
from trl.trainer.utils import strip_images_from_messages

from trl_entropy.rollouts.batch import GenerationBatch, join_rows

# Number of the round, and in it of a group or row, counted over all processes.
Place = tuple[int, int]


@dataclass(frozen=True)
class ScoredRound:
    """
    The results of one round.

    Attributes:
        batch: TRL's batch with the rows of this process.
        rewards: weighted sums of the reward functions, rows of all processes.
        informative: for each group of all processes, whether its rewards differ.
        logs: TRL's logged columns of completions, rows of all processes.
    """

    batch: GenerationBatch
    rewards: Tensor
    informative: Bool[Tensor, " P"]
    logs: dict[str, Any]


def round_size(num_missing: int, num_informative: int, num_drawn: int, unit: int, most: int) -> int:
    """
    Number of prompts of the next round: as many as are expected to contain `num_missing` informative groups.

    A further round costs more than further rows, since each round waits for its longest completion. So a single round
    should usually be enough.

    Args:
        num_informative, num_drawn: informative groups and all groups of the rounds so far.
        unit: smallest number of prompts whose completions can be shared evenly by the processes.
        most: prompts of a whole generation, a multiple of `unit`.
    """
    expected = most if not num_informative else math.ceil(num_missing * num_drawn / num_informative)
    return min(-(-expected // unit) * unit, most)


def chosen_groups(informative: list[Tensor]) -> list[Place]:
    """
    Where each group of the filled batch comes from. Informative groups of the first round stay; informative groups of
    later rounds fill the other places in the order in which they were drawn; if there are too few, the last of these
    places keep the first round's uninformative groups.

    Since only the order decides, the accepted groups are, given their number, independent draws from one distribution.
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
        fill: the padding value of tensors by name; 0 for those that are not named.
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
    """TRL's logged columns for the filled batch; None in rows of a round that does not have the column."""
    rows = _rows_of(chosen, num_generations)

    def taken(columns: list[list[Any] | None]) -> list[Any]:
        return [None if (column := columns[number]) is None else column[row] for number, row in rows]

    return {
        name: {key: taken([one.logs[name].get(key) for one in rounds]) for key in table}
        if isinstance(table, dict)
        else taken([one.logs[name] for one in rounds])
        for name, table in rounds[0].logs.items()
    }


def dropped_logs(rounds: list[ScoredRound], chosen: list[Place], num_generations: int) -> dict[str, list[Any]]:
    """
    TRL's logged columns of the groups that were drawn and not chosen, a row for each completion: `prompt`,
    `completion`, a column for each reward function, `resample_round` (0 is the first draw), `group` within the
    step's draws, and the `rule`: `"equal rewards"`, or `"not needed"` for groups that were more than the places.
    """
    places = [(k, group) for k, one in enumerate(rounds) for group in range(len(one.informative))]
    dropped = [(number, place) for number, place in enumerate(places) if place not in set(chosen)]
    rows = _rows_of([place for _, place in dropped], num_generations)
    functions = list(dict.fromkeys(name for one in rounds for name in one.logs["rewards"]))
    first = {
        name: [strip_images_from_messages(rounds[k].logs[name][row]) for k, row in rows]
        for name in ("prompt", "completion")
    }
    return {
        **first,
        **{name: [rounds[k].logs["rewards"][name][row] for k, row in rows] for name in functions},
        "resample_round": [k for k, _ in rows],
        "group": [number for number, _ in dropped for _ in range(num_generations)],
        "rule": [
            "not needed" if rounds[k].informative[group] else "equal rewards"
            for _, (k, group) in dropped
            for _ in range(num_generations)
        ],
    }


def _rows_of(groups: list[Place], num_generations: int) -> list[Place]:
    """The place, round and number, of every row of the groups."""
    return [(number, group * num_generations + i) for number, group in groups for i in range(num_generations)]


def _num_rows(batch: GenerationBatch) -> int:
    return len(batch["completion_ids"])


def _gathered_rows(
    rounds: list[ScoredRound], places: list[Place], rank: int, names: list[str]
) -> list[dict[str, Tensor]]:
    """The rows at `places`, which ascend, from the processes that have them, in parts to be joined. Collective."""
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
