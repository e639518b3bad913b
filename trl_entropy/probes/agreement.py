"""How well predictions have agreed with measurements over the run so far, and where their sum has led."""

from __future__ import annotations

import math

from trl_entropy.estimators.statistics.estimate import Estimate
from trl_entropy.estimators.statistics.moments import PairMoments, error_covariance
from trl_entropy.runs.state import StateDict

_STATISTICS = ("slope", "corrected_slope", "correlation", "r_squared", "ceiling_r_squared")


class RunningAgreement:
    """
    Regressions of measured on predicted over the probed steps, one for each kind of pair, and integrals of changes.

    Kinds: `same_sample` (agreement is calculus), `cross` (predicted on one half of the probe batch, measured on the
    other), `placebo` (another step's update).
    """

    def __init__(self) -> None:
        self._pairs: dict[str, PairMoments] = {}
        self._integrals: dict[str, float] = {}

    def add_pair(self, kind: str, predicted: Estimate, measured: Estimate, difference: Estimate | None = None) -> None:
        """Add a step; `difference` is the paired predicted - measured where both are on the same completions."""
        if not math.isfinite(predicted.value) or not math.isfinite(measured.value):
            return  # said in the step's own metrics; one such step must not silence all later ones
        covariance = error_covariance(predicted.stderr, measured.stderr, difference.stderr) if difference else 0.0
        moments = self._pairs.get(kind, PairMoments.empty())
        self._pairs[kind] = moments.update(
            predicted.value, measured.value, predicted.stderr, measured.stderr, covariance
        )

    def add_change(self, name: str, start: float, change: float) -> None:
        """Add a step's change to an integral, which begins at `start`, the entropy that the first step found."""
        self._integrals[name] = self._integrals.get(name, start) + change

    def metrics(self) -> dict[str, float]:
        """Statistics with their standard errors, from the third pair of a kind on; the integrals so far."""
        logged = {f"entropy/integral_{name}": value for name, value in self._integrals.items()}
        for kind, moments in self._pairs.items():
            if moments.num_pairs < 3:
                continue
            for statistic in _STATISTICS:
                estimate = getattr(moments, statistic)()
                logged[f"entropy/{kind}_{statistic}"] = estimate.value
                logged[f"entropy/{kind}_{statistic}_stderr"] = estimate.stderr
        return logged

    def state_dict(self) -> StateDict:
        """The sums so far."""
        return {"pairs": {kind: moments.sums for kind, moments in self._pairs.items()}, "integrals": self._integrals}

    def load_state_dict(self, state: StateDict) -> None:
        """Go on from sums that `state_dict` gave."""
        self._pairs = {kind: PairMoments(sums) for kind, sums in state["pairs"].items()}
        self._integrals = dict(state["integrals"])
