"""The values of a step, or of the steps between two log lines, each key reduced as `runs/metrics.py` says."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass

from trl_entropy.runs.metrics import over_steps
from trl_entropy.runs.state import StateDict


@dataclass
class _Values:
    """What all reductions need of a key's values. As in TRL, nan counts only where there is nothing else."""

    total: float = 0.0
    root_of_squares: float = 0.0
    count: int = 0
    largest: float = -math.inf
    smallest: float = math.inf
    last: float = math.nan

    def add(self, value: float) -> None:
        self.last = value
        if math.isnan(value):
            return
        self.total += value
        self.root_of_squares = math.hypot(self.root_of_squares, value)
        self.count += 1
        self.largest, self.smallest = max(self.largest, value), min(self.smallest, value)

    def reduced(self, rule: str) -> float:
        if rule == "last":
            return self.last
        if self.count == 0:
            return math.nan
        return {
            "mean": self.total / self.count,
            "error": self.root_of_squares / self.count,
            "max": self.largest,
            "min": self.smallest,
        }[rule]


class LogWindow:
    """Values by key since the last `clear`."""

    def __init__(self) -> None:
        self._values: dict[str, _Values] = {}

    def add(self, values: Mapping[str, Iterable[float]]) -> None:
        """Add values by key, such as those of the micro-batches of a step."""
        for key, several in values.items():
            for value in several:
                self._values.setdefault(key, _Values()).add(float(value))

    def reduced(self) -> dict[str, float]:
        """One number for each key; nan where every value is."""
        return {key: values.reduced(over_steps(key)) for key, values in self._values.items()}

    def clear(self) -> None:
        """Forget all values."""
        self._values.clear()

    def state_dict(self) -> StateDict:
        """Plain numbers by key."""
        return {key: asdict(values) for key, values in self._values.items()}

    def load_state_dict(self, state: StateDict) -> None:
        """Go on with the values that `state_dict` gave."""
        self._values = {key: _Values(**values) for key, values in state.items()}
