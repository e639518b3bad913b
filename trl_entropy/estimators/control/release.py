"""When a floor under the entropy is let go: a rule on the rewards of steps that have been made."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Release:
    """
    Lets go once the mean reward of a step's completions has been at least `level` in `steps` steps in a row, and stays
    so whatever the rewards are later.

    Attributes:
        streak: steps in a row, the last one included, whose mean reward reached the level.
        released: whether it has let go.
    """

    level: float
    steps: int
    streak: int = 0
    released: bool = False

    def add(self, reward: float) -> None:
        """Add the mean reward of the next step's completions; nan, where there is none, ends the streak."""
        self.streak = self.streak + 1 if reward >= self.level else 0
        self.released = self.released or self.streak >= self.steps
