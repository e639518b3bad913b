"""How well the predicted changes have agreed with the measured ones over the run so far, and their sums."""

from __future__ import annotations

import math
from collections.abc import Iterable

from trl_entropy.estimators.statistics.estimate import Estimate
from trl_entropy.estimators.statistics.moments import PairMoments, error_covariance, statistics_of_all
from trl_entropy.probes.logged import with_stderr
from trl_entropy.runs.state import StateDict

_STATISTICS = ("slope", "corrected_slope", "correlation", "r_squared", "ceiling_r_squared")


class RunningAgreement:
    """
    Regressions of the measured on the predicted change of a quantity over the probed steps, one regression for each
    kind of pair, and the sums of all changes (integrals).

    Kinds: `same_sample` (both on the same completions, so agreement only confirms the derivative), `cross` (predicted
    on one half of the probe batch, measured on the other), `placebo` (predicted from an earlier step's update).

    Args:
        quantity: its name, with which the metrics begin.
    """

    def __init__(self, quantity: str = "entropy") -> None:
        self.quantity = quantity
        self.pairs: dict[str, PairMoments] = {}
        self.integrals: dict[str, float] = {}

    def add_pair(self, kind: str, predicted: Estimate, measured: Estimate, difference: Estimate | None = None) -> None:
        """Add a step; `difference` is the estimate of predicted - measured if both use the same completions."""
        if not math.isfinite(predicted.value) or not math.isfinite(measured.value):
            return  # the step's own metrics show it; one such step must not make the statistics of all later ones nan
        covariance = error_covariance(predicted.stderr, measured.stderr, difference.stderr) if difference else 0.0
        moments = self.pairs.get(kind, PairMoments.empty())
        self.pairs[kind] = moments.update(
            predicted.value, measured.value, predicted.stderr, measured.stderr, covariance
        )

    def add_change(self, name: str, start: float, change: float) -> None:
        """Add a step's change to an integral, which begins at `start`, the quantity before the first step."""
        self.integrals[name] = self.integrals.get(name, start) + change

    def metrics(self) -> dict[str, float]:
        """The integrals so far, and for each kind with at least three pairs its statistics with standard errors."""
        return metrics_of_all([self])

    def state_dict(self) -> StateDict:
        """The sums so far."""
        return {"pairs": {kind: moments.sums for kind, moments in self.pairs.items()}, "integrals": self.integrals}

    def load_state_dict(self, state: StateDict) -> None:
        """Continue from the sums that `state_dict` returned."""
        self.pairs = {kind: PairMoments(sums) for kind, sums in state["pairs"].items()}
        self.integrals = dict(state["integrals"])


def metrics_of_all(agreements: Iterable[RunningAgreement]) -> dict[str, float]:
    """[`RunningAgreement.metrics`] of several quantities; the regressions of all are made together."""
    logged, told = dict[str, float](), dict[str, PairMoments]()
    for one in agreements:
        logged |= {f"{one.quantity}/integral_{name}": value for name, value in one.integrals.items()}
        told |= {f"{one.quantity}/{kind}": pairs for kind, pairs in one.pairs.items() if pairs.num_pairs >= 3}
    if not told:
        return logged
    for kind, statistics in zip(told, statistics_of_all(list(told.values()), _STATISTICS), strict=True):
        for name, estimate in statistics.items():
            logged |= with_stderr(f"{kind}_{name}", estimate)
    return logged
