"""`StepPrompts`: which prompts the present step can be made of, and how many prompt groups the run has generated."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from trl_entropy.runs.state import StateDict


class StepPrompts:
    """
    Prompts of the latest generations, those of all processes, so that a probe batch can be drawn from others.

    Args:
        num_generations: generations that a step can consist of.

    Attributes:
        num_groups: prompt groups generated so far; numbers the next ones.
    """

    def __init__(self, num_generations: int) -> None:
        self.num_groups = 0
        self._generations: deque[set[str]] = deque(maxlen=num_generations)

    def reset(self) -> None:
        """Training begins anew, with a new generation."""
        self.num_groups = 0
        self._generations.clear()

    def add(self, prompts: Iterable[str], num_groups: int) -> None:
        """A generation of so many groups has been drawn from these prompts, named by `prompt_key`."""
        self._generations.append(set(prompts))
        self.num_groups += num_groups

    def all(self) -> set[str]:
        """Every prompt that the step can contain."""
        return set().union(*self._generations)

    def state_dict(self) -> StateDict:
        """Prompts and number of groups."""
        return {"num_groups": self.num_groups, "generations": [sorted(prompts) for prompts in self._generations]}

    def load_state_dict(self, state: StateDict) -> None:
        """Go on from what `state_dict` gave."""
        self.num_groups = state["num_groups"]
        self._generations = deque(map(set, state["generations"]), maxlen=self._generations.maxlen)
