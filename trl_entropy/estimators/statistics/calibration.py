"""Whether stated standard errors are right: many independent redraws of an estimate compared with the truth."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import torch
from jaxtyping import Float
from torch import Tensor

from trl_entropy.estimators.statistics.estimate import Estimate


@dataclass(frozen=True)
class Coverage:
    """How well an estimator's stated errors fit its redraws; in units of the estimate, or as shares of redraws.

    Attributes:
        truth: the value that the intervals should cover.
        num_redraws: redraws with a standard error; everything below is over these, `scatter` and `bias` too.
        num_without_stderr: redraws whose standard error is nan (a negative variance estimate), counted separately.
        covered, covered_low, covered_high: share of intervals that cover the truth, and its own Wilson interval.
        missed_above, missed_below: shares of intervals that lie wholly above and wholly below the truth.
        mean_stderr, rms_stderr: mean of the stated errors, root of the mean of their squares.
        scatter, scatter_stderr: standard deviation of the values over the redraws, which the stated errors estimate,
            and its own error, from the values' kurtosis.
        bias: mean value minus truth.
    """

    truth: float
    num_redraws: int
    num_without_stderr: int
    covered: float
    covered_low: float
    covered_high: float
    missed_above: float
    missed_below: float
    mean_stderr: float
    rms_stderr: float
    scatter: float
    scatter_stderr: float
    bias: float

    @property
    def stderr_ratio(self) -> float:
        """Mean stated error over scatter; below 1 the stated errors are too small."""
        return _ratio(self.mean_stderr, self.scatter)

    @property
    def rms_stderr_ratio(self) -> float:
        """As `stderr_ratio` with the root mean square, which is about 1 for an unbiased variance."""
        return _ratio(self.rms_stderr, self.scatter)

    @property
    def bias_ratio(self) -> float:
        """Bias over scatter."""
        return _ratio(self.bias, self.scatter)


def coverage(estimates: Sequence[Estimate], truth: float, confidence: float = 0.95) -> Coverage:
    """How often the stated t intervals cover `truth`, and stated error against scatter, over independent redraws.

    A truth that is estimated from R redraws has an error of 1/sqrt(R) of a redraw's. This lowers the expected coverage
    by about z phi(z) / R where truth and redraws are independent, and raises it as much where the truth is the mean of
    these redraws. In either case it is 0.11 / R at 95 %, far below the binomial error, and not corrected for.

    Args:
        estimates: R independent redraws of one estimator.
        truth: its expectation, or the population's value.
        confidence: of the intervals, and of the Wilson interval of their coverage.

    Raises:
        ValueError: if fewer than 2 estimates have a standard error.
    """
    stated = [estimate for estimate in estimates if not math.isnan(estimate.stderr)]
    if len(stated) < 2:
        raise ValueError(f"{len(stated)} of {len(estimates)} redraws have a standard error; at least 2 are needed")
    intervals = _column([estimate.interval(confidence) for estimate in stated])
    above, below = int((intervals[:, 0] > truth).sum()), int((intervals[:, 1] < truth).sum())
    values, stderrs = _column([estimate.value for estimate in stated]), _column([e.stderr for e in stated])
    num, hits = len(stated), len(stated) - above - below
    scatter = float(values.std())
    low, high = wilson_interval(hits, num, confidence)
    return Coverage(
        truth=truth,
        num_redraws=num,
        num_without_stderr=len(estimates) - num,
        covered=hits / num,
        covered_low=low,
        covered_high=high,
        missed_above=above / num,
        missed_below=below / num,
        mean_stderr=float(stderrs.mean()),
        rms_stderr=float(stderrs.square().mean().sqrt()),
        scatter=scatter,
        scatter_stderr=scatter * math.sqrt((kurtosis(values) - 1) / (4 * num)) if scatter else 0.0,
        bias=float(values.mean()) - truth,
    )


def wilson_interval(num_hits: int, num_trials: int, confidence: float = 0.95) -> tuple[float, float]:
    """The interval of a binomial share: the p with |hits/n - p| <= z sqrt(p (1-p) / n).

    Source: E. B. Wilson (1927). (nan, nan) without a trial.
    """
    if num_trials == 0:
        return math.nan, math.nan
    z_sq = NormalDist().inv_cdf(0.5 + confidence / 2) ** 2
    centre = num_hits + z_sq / 2
    margin = math.sqrt(z_sq * (num_hits * (num_trials - num_hits) / num_trials + z_sq / 4))
    low, high = (centre - margin) / (num_trials + z_sq), (centre + margin) / (num_trials + z_sq)
    # At the edges the equation's solutions are 0 and 1 exactly, and rounding would put them inside.
    return (0.0 if num_hits == 0 else low), (1.0 if num_hits == num_trials else high)


def kurtosis(values: Float[Tensor, "B"]) -> float:
    """E[(x - mean)^4] / variance^2: 3 for a normal distribution.

    For the influences of single completions it tells how many completions an interval needs: a variance estimated from
    B of them has a relative error of about sqrt((kurtosis - 1) / B).
    """
    centred = values.double() - values.double().mean()
    return float(centred.pow(4).mean() / centred.square().mean().square())


def _column(numbers: Sequence[float] | Sequence[tuple[float, float]]) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def _ratio(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator else math.nan
