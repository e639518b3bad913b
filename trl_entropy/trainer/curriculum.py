"""A curriculum: a sampler that draws prompts by how often their completions have earned the reward so far."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.data import Sampler

from trl_entropy.runs.counted import counted
from trl_entropy.runs.state import StateDict

BUCKETS = ("hard", "normal", "easy")
START_RATE = 0.5


class PassRateSampler(Sampler[int]):
    """
    Draws prompts from three buckets by their pass rate; replaces TRL's `RepeatSampler`, with its layout and length.

    A prompt's pass rate is an exponential moving average over its groups, 0.5 before the first. A prompt is hard below
    `hard_below`, easy above `easy_above`, and normal between. For every prompt of a generation a bucket is drawn with
    probability proportional to its weight, among those that have a prompt left; from it comes the prompt that was
    drawn longest ago. Prompts of a generation are distinct. All ranks draw the same prompts if they are given the same
    pass rates.

    Args:
        num_prompts: rows of the dataset.
        batch_size: prompts of one generation, over all processes.
        mini_repeat_count, repeat_count: as in `RepeatSampler`: completions per prompt, and uses of each generation.
        hard_below, easy_above: pass rates between which a prompt is normal.
        weights: weights of the buckets hard, normal and easy.
        ema: weight of a prompt's newest group in its pass rate, in (0, 1].
        seed: seeds the draws of buckets, and the order of the prompts on the first pass through the dataset.

    Raises:
        ValueError: if there are fewer prompts than a generation takes, or bounds, weights or `ema` are out of range.
    """

    def __init__(
        self,
        num_prompts: int,
        batch_size: int,
        mini_repeat_count: int,
        repeat_count: int,
        hard_below: float = 0.2,
        easy_above: float = 0.8,
        weights: Sequence[float] = (1.0, 2.0, 0.5),
        ema: float = 0.5,
        seed: int = 0,
    ) -> None:
        if not (0 <= hard_below <= easy_above <= 1 and 0 < ema <= 1 and min(weights) >= 0 < max(weights)):
            raise ValueError(
                f"hard_below={hard_below}, easy_above={easy_above}, weights={weights}, ema={ema}: required are 0 <= "
                "hard_below <= easy_above <= 1, weights of 0 or more with at least one above 0, and ema in (0, 1]."
            )
        if num_prompts < batch_size:
            raise ValueError(
                f"the dataset has {counted(num_prompts, 'prompt')}, a generation takes {batch_size} distinct ones."
            )
        self.num_prompts, self.batch_size = num_prompts, batch_size
        self.mini_repeat_count, self.repeat_count = mini_repeat_count, repeat_count
        self.bounds, self.ema = (hard_below, easy_above), ema
        self.weights = torch.tensor(weights, dtype=torch.float64)
        self.generator = torch.Generator().manual_seed(seed)
        self.rates = torch.full((num_prompts,), START_RATE, dtype=torch.float64)
        # Number of each prompt's latest draw; the smallest is drawn next. The first pass is a random permutation.
        self._turn = torch.randperm(num_prompts, generator=self.generator) - num_prompts
        self._next_turn = 0
        self._drawn: list[list[int]] = []  # the prompts of each generation of this epoch
        self._to_replay: list[list[int]] = []
        self.resumes_within_epoch = False

    def __len__(self) -> int:
        return (self.num_prompts // self.batch_size) * self.batch_size * self.mini_repeat_count * self.repeat_count

    def __iter__(self) -> Iterator[int]:
        self._drawn, replay = [], self._to_replay
        self._to_replay = []
        for number in range(self.num_prompts // self.batch_size):
            self._drawn.append(replay[number] if number < len(replay) else self.draw(self.batch_size))
            for _ in range(self.repeat_count):
                for index in self._drawn[-1]:
                    yield from [index] * self.mini_repeat_count

    def update(self, rates: Mapping[int, float]) -> None:
        """Update the moving averages with the pass rates of newly scored groups, given by row of the dataset."""
        for index, rate in rates.items():
            self.rates[index] += self.ema * (rate - self.rates[index])

    def bucket_sizes(self) -> dict[str, int]:
        """Prompts in each bucket."""
        counts = torch.bincount(self._buckets(), minlength=len(BUCKETS)).tolist()
        return dict(zip(BUCKETS, counts, strict=True))

    def _buckets(self) -> Tensor:
        return (self.rates >= self.bounds[0]).long() + (self.rates > self.bounds[1]).long()

    def draw(self, num_prompts: int, exclude: Collection[int] = ()) -> list[int]:
        """Distinct rows outside `exclude`, in the order of their draw; fewer if the dataset has no more."""
        buckets, chosen = self._buckets(), list[int]()
        waiting = [self._by_turn(buckets == number, exclude) for number in range(len(BUCKETS))]
        while len(chosen) < num_prompts and any(waiting):
            number = self._draw_bucket([bool(queue) for queue in waiting])
            chosen.append(waiting[number].pop())
            self._turn[chosen[-1]] = self._next_turn
            self._next_turn += 1
        return chosen

    def _by_turn(self, members: Tensor, exclude: Collection[int]) -> list[int]:
        """Rows of a bucket, most recently drawn first."""
        rows = members.nonzero().squeeze(1)
        ordered = rows[self._turn[rows].argsort(descending=True)].tolist()
        return [row for row in ordered if row not in exclude] if exclude else ordered

    def _draw_bucket(self, filled: list[bool]) -> int:
        weights: Float[Tensor, " buckets"] = self.weights * torch.tensor(filled)
        if not weights.any():  # only buckets of weight 0 have prompts left
            weights = torch.tensor(filled, dtype=torch.float64)
        return int(torch.multinomial(weights, 1, generator=self.generator))

    # ---- resuming

    def state_dict(self) -> StateDict:
        """Everything that later draws depend on, and this epoch's draws, including the generation fetched ahead."""
        return {
            "rates": self.rates,
            "turn": self._turn,
            "next_turn": self._next_turn,
            "generator": self.generator.get_state(),
            "drawn": self._drawn,
        }

    def load_state_dict(self, state: StateDict) -> None:
        """
        Continue from a saved state. If `resumes_within_epoch`, the next iteration belongs to the epoch that was saved,
        and first repeats the draws that it had made.
        """
        self.rates, self._turn, self._next_turn = state["rates"], state["turn"], state["next_turn"]
        self.generator.set_state(state["generator"])
        self._to_replay = state["drawn"] if self.resumes_within_epoch else []
