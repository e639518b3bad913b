"""`StepPrompts`: the prompts that the present step may contain, and the number of prompt groups generated so far."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable

from trl_entropy.runs.state import StateDict


def most_generations(micro_batches: int, steps_per_generation: int) -> int:
    """
    The most generations that a step's completions can come from.

    Args:
        micro_batches: of a step.
        steps_per_generation: micro-batches that are made of a generation.
    """
    latest_start = steps_per_generation - math.gcd(micro_batches, steps_per_generation)  # of a step, in a generation
    return -(-(latest_start + micro_batches) // steps_per_generation)


class StepPrompts:
    """
    Prompts of the latest generations of all processes, which a probe batch of held-out prompts must not contain.

    Args:
        num_generations: largest number of generations that the completions of a step can come from.

    Attributes:
        num_groups: prompt groups generated so far, which is the number of the next group.
    """

    def __init__(self, num_generations: int) -> None:
        self.num_groups = 0
        self._generations: deque[set[str]] = deque(maxlen=num_generations)

    def reset(self) -> None:
        """Training begins anew, with a new generation."""
        self.num_groups = 0
        self._generations.clear()

    def add(self, prompts: Iterable[str], num_groups: int) -> None:
        """Add a generation of `num_groups` groups and its prompts, as `prompt_key` gives them."""
        self._generations.append(set(prompts))
        self.num_groups += num_groups

    def all(self) -> set[str]:
        """Every prompt that the step can contain."""
        return set().union(*self._generations)

    def state_dict(self) -> StateDict:
        """Prompts and number of groups."""
        return {"num_groups": self.num_groups, "generations": [sorted(prompts) for prompts in self._generations]}

    def load_state_dict(self, state: StateDict) -> None:
        """Continue from what `state_dict` returned."""
        self.num_groups = state["num_groups"]
        self._generations = deque(map(set, state["generations"]), maxlen=self._generations.maxlen)
