"""Slope, correlation and R^2 of measured on predicted over many steps, from running sums that can be added."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from trl_entropy.estimators.statistics.estimate import Estimate

_NUM_FEATURES = 9  # 1, x, y, x^2, x y, y^2, and the error's variance of x, covariance, variance of y


class _Variances(NamedTuple):
    xx: Float[Tensor, "*N"]
    xy: Float[Tensor, "*N"]
    yy: Float[Tensor, "*N"]
    error_xx: Float[Tensor, "*N"]
    error_xy: Float[Tensor, "*N"]
    error_yy: Float[Tensor, "*N"]


@dataclass(frozen=True)
class PairMoments:
    """Sums over pairs of the outer product of their features, from which the statistics and their errors follow.

    A pair is one step's predicted value x and measured value y, each with its standard error, and the covariance of
    the two errors (0 if they come from independent probe batches). Pairs must be independent of one another. Every
    statistic is a smooth function f of the mean features; its stderr^2 is grad f' Cov grad f / (n - 2), with n - 2
    degrees of freedom and bias O(1/n). This is the sandwich form: errors may differ from pair to pair, as they do
    along a run. Where a few pairs determine most of the slope the stderr is some 10 % too small; for tables
    `jackknife` is safer. The sums are raw moments in float64: a mean of 1000 times the spread costs 12 of the 16
    digits of the stderr.
    """

    sums: Float[Tensor, "features features"]

    @classmethod
    def empty(cls) -> "PairMoments":
        """The moments of no pairs."""
        return cls(torch.zeros(_NUM_FEATURES, _NUM_FEATURES, dtype=torch.float64))

    def update(
        self,
        predicted: float,
        measured: float,
        predicted_stderr: float = 0.0,
        measured_stderr: float = 0.0,
        error_covariance: float = 0.0,
    ) -> "PairMoments":
        """The moments with one pair added. A nan in a pair makes every statistic nan, so leave such a step out."""
        x, y = predicted, measured
        errors = (predicted_stderr**2, error_covariance, measured_stderr**2)
        features = torch.tensor([1.0, x, y, x * x, x * y, y * y, *errors], dtype=torch.float64)
        return PairMoments(self.sums + features.outer(features))

    def merge(self, other: "PairMoments") -> "PairMoments":
        """The moments of both sets of pairs."""
        return PairMoments(self.sums + other.sums)

    @property
    def num_pairs(self) -> int:
        return int(self.sums[0, 0])

    def slope(self) -> Estimate:
        """The least-squares slope of measured on predicted, with intercept: Cov(x, y) / Var(x).

        Noise in x biases it towards zero; see `corrected_slope`.
        """
        return self._estimate(STATISTICS["slope"])

    def corrected_slope(self) -> Estimate:
        """The slope corrected for noise: (Cov(x, y) - error covariance) / (Var(x) - error variance of x).

        Errors enter by their mean over pairs, and are taken as known. Nothing is clamped: where noise is all the
        variance, the denominator is near or below zero and the interval has no meaning. Source: W. A. Fuller,
        Measurement Error Models (1987), section 1.2 and, for errors that differ from pair to pair, 3.1.
        """
        return self._estimate(STATISTICS["corrected_slope"])

    def correlation(self) -> Estimate:
        """Pearson's correlation of predicted and measured."""
        return self._estimate(STATISTICS["correlation"])

    def r_squared(self) -> Estimate:
        """R^2 of the regression of measured on predicted with intercept: the squared correlation."""
        return self._estimate(STATISTICS["r_squared"])

    def ceiling_r_squared(self) -> Estimate:
        """The R^2 that a perfect prediction would have with the stated errors of both values.

        A perfect prediction has corrected correlation 1, hence R^2 = (sqrt(Vx Vy) + c)^2 / (Var(x) Var(y)) with Vx, Vy
        the variances less the errors' and c the errors' covariance. nan where the errors of either value exceed its
        variance, as they do by chance over few steps: what is left is then no variance of a signal. Where it is a
        number it is at most 1, if the errors' covariances are possible ones.
        """
        return self._estimate(STATISTICS["ceiling_r_squared"])

    def share_of_ceiling(self) -> Estimate:
        """`r_squared` over `ceiling_r_squared`: 1 if the two differ only by scale, constant and the stated errors."""
        return self._estimate(lambda v: v.xy.square() / (v.xx * v.yy) / _ceiling_r_squared(v))

    def _estimate(self, function: Callable[[_Variances], Float[Tensor, ""]]) -> Estimate:
        count = self.num_pairs
        second_moments = self.sums / self.sums[0, 0]
        means = second_moments[0].clone().requires_grad_()
        value = function(_variances(means, self.sums[0, 0]))
        (gradient,) = torch.autograd.grad(value, means)
        if count < 3:
            return Estimate(float(value.detach()), math.nan, float(count - 2), count)
        spread = second_moments - second_moments[0].outer(second_moments[0])
        variance = gradient @ spread @ gradient / (count - 2)
        return Estimate(float(value.detach()), float(variance.sqrt()), float(count - 2), count)


def jackknife(pairs: Sequence[PairMoments], statistic: Callable[[PairMoments], Estimate]) -> Estimate:
    """A statistic of many pairs, each given as the moments of one, with its delete-one-pair jackknife error.

    stderr^2 = (n-1)/n sum_i (f_-i - mean f_-i)^2 with n - 2 degrees of freedom; slightly conservative. Example:
    `jackknife([PairMoments.empty().update(x, y) for x, y in steps], PairMoments.slope)`. Cost: n times the statistic.
    """
    count = len(pairs)
    whole = PairMoments(sum(pair.sums for pair in pairs))
    values = torch.tensor(
        [statistic(PairMoments(whole.sums - pair.sums)).value for pair in pairs], dtype=torch.float64
    )
    stderr = ((count - 1) / count * (values - values.mean()).square().sum()).sqrt()
    return Estimate(statistic(whole).value, float(stderr), float(count - 2), count)


def statistics_of_all(sets: Sequence[PairMoments], names: Sequence[str]) -> list[dict[str, Estimate]]:
    """What `PairMoments` says of each set of pairs, by names of its methods (those in `STATISTICS`), in one pass."""
    sums = torch.stack([one.sums for one in sets])
    counts = sums[:, 0, 0]
    second_moments = sums / counts[:, None, None]
    # Every statistic has a copy of the means, so that one backward pass gives the gradients of all.
    means = second_moments[:, 0].expand(len(names), -1, -1).clone().requires_grad_()
    each = zip(names, means, strict=True)
    values = torch.stack([STATISTICS[name](_variances(its.T, counts)) for name, its in each])
    (gradients,) = torch.autograd.grad(values.sum(), means)
    spread = second_moments - second_moments[:, :1].mT * second_moments[:, :1]
    variances = torch.einsum("skf,kfg,skg->sk", gradients, spread, gradients) / (counts - 2)
    stderrs = variances.sqrt().where(counts > 2, math.nan)
    found: list[dict[str, Estimate]] = []
    for n, *its in zip(counts.tolist(), values.T.tolist(), stderrs.T.tolist(), strict=True):
        found.append(
            {name: Estimate(value, stderr, n - 2, int(n)) for name, value, stderr in zip(names, *its, strict=True)}
        )
    return found


def error_covariance(predicted_stderr: float, measured_stderr: float, difference_stderr: float) -> float:
    """The covariance of two errors from their standard errors and that of their paired difference."""
    return (predicted_stderr**2 + measured_stderr**2 - difference_stderr**2) / 2


def _variances(means: Float[Tensor, "K *N"], count: Float[Tensor, "*N"]) -> _Variances:
    """Unbiased sample variances and covariance of x and y, and the mean error variances and covariance."""
    _, x, y, xx, xy, yy, *errors = means
    bessel = count / (count - 1)
    return _Variances(bessel * (xx - x * x), bessel * (xy - x * y), bessel * (yy - y * y), *errors)


def _ceiling_r_squared(v: _Variances) -> Float[Tensor, "*N"]:
    # Two roots, not the root of the product: where both variances are negative their product is not.
    signal = (v.xx - v.error_xx).sqrt() * (v.yy - v.error_yy).sqrt()
    return (signal + v.error_xy).square() / (v.xx * v.yy)


# The statistics of a regression of y on x, see the methods of these names.
STATISTICS: dict[str, Callable[[_Variances], Float[Tensor, "*N"]]] = {
    "slope": lambda v: v.xy / v.xx,
    "corrected_slope": lambda v: (v.xy - v.error_xy) / (v.xx - v.error_xx),
    "correlation": lambda v: v.xy / (v.xx * v.yy).sqrt(),
    "r_squared": lambda v: v.xy.square() / (v.xx * v.yy),
    "ceiling_r_squared": _ceiling_r_squared,
}
