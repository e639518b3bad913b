"""`Claim`: a published claim, what would refute it, and how a measurement with its interval becomes a verdict."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from trl_entropy.analysis.run import Run
from trl_entropy.estimators.statistics.estimate import Estimate

Verdict = Literal["holds", "fails", "cannot tell here"]
# The runs of each family that a claim asks for, by the family's name.
Runs = Mapping[str, Sequence[Run]]


@dataclass(frozen=True)
class Expected:
    """
    A number that is measured, and the values that it has if the claim is right; without bounds it is shown alone.

    Attributes:
        what: what the number is.
        above, below: between which the claim puts it.
    """

    what: str
    above: float = -math.inf
    below: float = math.inf

    @property
    def decides(self) -> bool:
        return math.isfinite(self.above) or math.isfinite(self.below)

    def verdict(self, low: float, high: float) -> Verdict:
        """The claim holds if the whole interval lies where it should, and fails if the whole of it does not."""
        if math.isnan(low + high):
            return "cannot tell here"
        if self.above < low and high < self.below:
            return "holds"
        return "fails" if high < self.above or low > self.below else "cannot tell here"


@dataclass(frozen=True)
class Claim:
    """
    A published claim. All but `measure` was written down before the runs were made.

    Attributes:
        name: of the claim and of its file.
        source: where it is published.
        statement: what is claimed, in a sentence or two.
        refuted_by: what would refute it here, and why in these numbers.
        expected: the numbers that decide, by the names that `measure` gives them.
        families: which runs it reads.
        measure: the numbers, each with its error, from these runs; one that cannot be had is left out.
        caveat: what this measurement cannot show.
    """

    name: str
    source: str
    statement: str
    refuted_by: str
    expected: Mapping[str, Expected]
    families: Sequence[str]
    measure: Callable[[Runs], dict[str, Estimate]] = field(repr=False)
    caveat: str = ""

    def judge(self, runs: Runs) -> Finding:
        """Measure, and say what follows: one number on the wrong side is enough to fail, and all must be right."""
        return self.judged(self.measure(runs))

    def judged(self, found: Mapping[str, Estimate]) -> Finding:
        """The verdict from these numbers."""
        of_each = [
            self.expected[name].verdict(*estimate.interval())
            for name, estimate in found.items()
            if self.expected[name].decides
        ]
        missing = any(one.decides and name not in found for name, one in self.expected.items())
        whole: Verdict = "cannot tell here"
        if "fails" in of_each:
            whole = "fails"
        elif of_each and not missing and all(one == "holds" for one in of_each):
            whole = "holds"
        return Finding(self, whole, dict(found))


@dataclass(frozen=True)
class Finding:
    """A claim's verdict, and the numbers that it comes from."""

    claim: Claim
    verdict: Verdict
    numbers: Mapping[str, Estimate]


def over_runs(values: Sequence[float]) -> Estimate:
    """The mean over runs of one setup, with Student's t interval over them; runs without the number are left out."""
    known = [value for value in values if math.isfinite(value)]
    count = len(known)
    mean = sum(known) / count if count else math.nan
    spread = math.sqrt(sum((value - mean) ** 2 for value in known) / (count - 1)) if count > 1 else math.nan
    return Estimate(mean, spread / math.sqrt(count) if count else math.nan, count - 1.0, count)


def of_each_run(runs: Sequence[Run], statistics: Callable[[Run], Mapping[str, float]]) -> dict[str, Estimate]:
    """The numbers that `statistics` has of each run, as means over the runs."""
    tables = [statistics(run) for run in runs]
    names = list(dict.fromkeys(name for table in tables for name in table))
    return {name: over_runs([table.get(name, math.nan) for table in tables]) for name in names}


def correlation(x: Sequence[float], y: Sequence[float]) -> float:
    """Pearson's; nan if there are fewer than three pairs or one side does not vary."""
    if len(x) < 3:
        return math.nan
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    xx, yy = sum((one - mean_x) ** 2 for one in x), sum((one - mean_y) ** 2 for one in y)
    product = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return product / math.sqrt(xx * yy) if xx > 0 and yy > 0 else math.nan
