"""What each kind of token paid in entropy for what it earned in reward, over the run (T22)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from trl_entropy.estimators.attribution.shares import CategoryRecord
from trl_entropy.estimators.statistics.pooled import PooledParts
from trl_entropy.runs.state import StateDict


class PriceRecord:
    """
    The parts of the change of entropy and of reward that each category of tokens makes, summed over steps, and their
    ratio: nats per token lost for a unit of expected reward gained, negative where both rise or both fall. The
    interval is Fieller's: (-inf, inf) where the reward's part is consistent with 0.

    Args:
        names: of the categories, which partition the tokens of the step's completions.
        with_all: log all of them together too, as `all`, and those of which there was no token yet.
    """

    def __init__(self, names: Sequence[str], with_all: bool = True) -> None:
        self._names, self._with_all = tuple(names), with_all
        self._record = CategoryRecord.empty([f"{what}_{name}" for what in ("paid", "earned") for name in names])

    def add(
        self, paid: Float[Tensor, "P C"], earned: Float[Tensor, "P C"], counts: Int[Tensor, " C"]
    ) -> dict[str, float]:
        """
        Add a step and return what is logged of the run so far.

        Args:
            paid, earned: sums of the parts of the change of entropy (nats per token) and of reward by prompt.
            counts: tokens of each category.
        """
        self._record = self._record.update(torch.cat([paid, earned], dim=1), torch.cat([counts, counts]))
        logged: dict[str, float] = {}
        for name, members in self._logged().items():
            gained = self._record.change(*(f"earned_{one}" for one in members))
            low, high = gained.interval()
            key = f"reward/mean_delta_{name}"
            logged |= {key: gained.value, f"{key}_low": low, f"{key}_high": high}
            ratio = self._weights("paid", members, -1.0), self._weights("earned", members, 1.0)
            low, high = self._record.parts.ratio_interval(*ratio, 0.95)
            key = f"reward/price_{name}"
            logged |= {key: self._record.parts.ratio(*ratio).value, f"{key}_low": low, f"{key}_high": high}
        return logged

    def _logged(self) -> dict[str, tuple[str, ...]]:
        """The members of each category that is logged."""
        if self._with_all:
            return {**{name: (name,) for name in self._names}, "all": self._names}
        return {name: (name,) for name in self._names if f"paid_{name}" in self._record.present}

    def _weights(self, what: str, members: Sequence[str], sign: float) -> Float[Tensor, " C"]:
        chosen = {f"{what}_{one}" for one in members}
        return torch.tensor([sign * (name in chosen) for name in self._record.names], dtype=torch.float64)

    def state_dict(self) -> StateDict:
        return {"parts": {**vars(self._record.parts)}, "counts": self._record.counts}

    def load_state_dict(self, state: StateDict | None) -> None:
        """Go on from a state; a checkpoint of an earlier version has none."""
        if state:
            self._record = CategoryRecord(self._record.names, PooledParts(**state["parts"]), state["counts"])
