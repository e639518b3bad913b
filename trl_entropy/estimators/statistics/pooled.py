"""Quantities summed over steps with the covariance of their errors, then divided once, with an interval.

Every step gives K values, and what each would have been without each single prompt. Prompts are independent within a
step given the policy, and so are the errors of later steps given earlier ones, so that the jackknife covariances of
the steps can be added.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from trl_entropy.estimators.statistics.estimate import Estimate
from trl_entropy.estimators.statistics.student_t import student_t_quantile


class StepParts(NamedTuple):
    """K quantities of one step, the covariance of their errors, and the number of its prompts."""

    values: Float[Tensor, "K"]
    covariance: Float[Tensor, "K K"]
    num_prompts: int


@dataclass(frozen=True)
class PooledParts:
    """Sums over steps of K quantities, of the covariance of their errors, and of counts; two such sums can be added.

    They estimate the sum (or mean) over exactly these steps, each at its own parameters; the error is over fresh
    prompts and completions. A step with a nan makes everything nan, so leave it out.

    Attributes:
        values, covariance: the sums over steps.
        squares: sum over steps of vec(C) vec(C)' / dof, C the step's covariance: what `dof` needs.
        num_steps, num_samples: counts of steps, and of prompts.
        smallest_dof, total_dof: the smallest of the steps' degrees of freedom, and their sum.
    """

    values: Float[Tensor, "K"]
    covariance: Float[Tensor, "K K"]
    squares: Float[Tensor, "K*K K*K"]
    num_steps: int
    num_samples: int
    smallest_dof: float
    total_dof: float

    @classmethod
    def empty(cls, num_parts: int) -> "PooledParts":
        """The sums over no steps."""
        zeros = torch.zeros(num_parts**2, num_parts**2, dtype=torch.float64)
        return cls(zeros[0, :num_parts], zeros[:num_parts, :num_parts], zeros, 0, 0, math.inf, 0.0)

    @classmethod
    def of_step(cls, step: StepParts, dof: float | None = None, square_bias: float = 1.0) -> "PooledParts":
        """The sums over one step, whose covariance has `dof` degrees of freedom, P - 1 if not given.

        `square_bias` is by how much the square of a variance is too large on average, where that is to be taken out.
        """
        dof = float(step.num_prompts - 1) if dof is None else dof
        values, covariance = step.values.double().cpu(), step.covariance.double().cpu()
        entries = covariance.flatten()
        squares = entries.outer(entries) / torch.tensor(square_bias * dof, dtype=torch.float64)
        return cls(values, covariance, squares, 1, step.num_prompts, dof, dof)

    def update(self, step: StepParts) -> "PooledParts":
        """The sums with one step added; all steps have the same weight, and `num_samples` counts prompts."""
        return self.merge(PooledParts.of_step(step))

    def merge(self, other: "PooledParts") -> "PooledParts":
        """The sums over both sets of steps."""
        return PooledParts(
            self.values + other.values,
            self.covariance + other.covariance,
            self.squares + other.squares,
            self.num_steps + other.num_steps,
            self.num_samples + other.num_samples,
            min(self.smallest_dof, other.smallest_dof),
            self.total_dof + other.total_dof,
        )

    def dof(self, weights: Float[Tensor, "K"]) -> float:
        """The degrees of freedom of the error of a linear combination: (sum_s v_s)^2 / sum_s (v_s^2 / dof_s).

        v_s = w' C_s w is the variance that step s adds. If a few steps add most of the variance, only theirs count.
        The result lies between the smallest and the sum of the steps' degrees of freedom, and is the sum where nothing
        varies. Source: F. E. Satterthwaite, Biometrics Bulletin 2 (1946) 110; B. L. Welch, Biometrika 34 (1947) 28.
        """
        products = weights.outer(weights).flatten()
        variance, squares = weights @ self.covariance @ weights, products @ self.squares @ products
        found = float(variance.square() / squares)
        return self.total_dof if math.isnan(found) else min(max(found, self.smallest_dof), self.total_dof)

    def mean(self, weights: Float[Tensor, "K"]) -> Estimate:
        """The mean over steps of a linear combination of the parts; as unbiased as they are. No steps: nan (0/0)."""
        count = torch.tensor(self.num_steps, dtype=torch.float64)
        return self._estimate(weights @ self.values / count, weights / count)

    def ratio(self, numerator: Float[Tensor, "K"], denominator: Float[Tensor, "K"]) -> Estimate:
        """The ratio of two linear combinations, stderr by the delta method; bias O(1/(steps P)), 0/0: nan.

        Where the denominator is within a few standard errors of 0 the stderr has no meaning; use `ratio_interval`.
        """
        top, bottom = numerator @ self.values, denominator @ self.values
        weights = (numerator - top / bottom * denominator) / bottom
        return self._estimate(top / bottom, weights)

    def ratio_interval(
        self, numerator: Float[Tensor, "K"], denominator: Float[Tensor, "K"], confidence: float = 0.95
    ) -> tuple[float, float]:
        """Fieller's confidence interval of the ratio: all rho with |numerator - rho denominator| <= t stderr.

        It keeps its coverage however small the denominator is. Where the denominator is consistent with 0 no bounded
        interval can do so, and it is (-inf, inf). Without errors: nan. The degrees of freedom are the fewest of those
        of the numerator, the denominator and the ratio. Source: E. C. Fieller, J. Roy. Statist. Soc. B 16 (1954) 175.
        """
        both = torch.stack([numerator, denominator])
        dof = min(self.dof(numerator), self.dof(denominator), self.ratio(numerator, denominator).dof)
        quantile = student_t_quantile(0.5 + confidence / 2, dof)
        top, bottom = (both @ self.values).tolist()
        (top_var, cross), (_, bottom_var) = (quantile**2 * (both @ self.covariance @ both.T)).tolist()
        a, b, c = bottom**2 - bottom_var, top * bottom - cross, top**2 - top_var
        if math.isnan(a + b + c):
            return math.nan, math.nan
        if a <= 0:
            return -math.inf, math.inf
        # b^2 >= a c whenever a > 0, since the ratio itself is in the interval; max: rounding can make it negative.
        half_width = math.sqrt(max(b * b - a * c, 0.0)) / a
        return b / a - half_width, b / a + half_width

    def _estimate(self, value: Float[Tensor, ""], weights: Float[Tensor, "K"]) -> Estimate:
        """A value whose error is that of this linear combination of the sums."""
        variance = weights @ self.covariance @ weights
        return Estimate(float(value), float(variance.sqrt()), self.dof(weights), self.num_samples)


def sum_over_prompts(prompt_values: Float[Tensor, "P K"]) -> StepParts:
    """A step's sums over P prompts of K values per prompt, with their covariance by the jackknife.

    This is P/(P-1) sum_p (x_p - mean)(x_p - mean)', unbiased: without prompt p the sum is P times the others' mean.
    """
    prompt_values = prompt_values.double()
    num_prompts = len(prompt_values)
    left_out = num_prompts * means_without_one(prompt_values)
    return StepParts(prompt_values.sum(0), jackknife_covariance(left_out), num_prompts)


def means_without_one(values: Float[Tensor, "P *K"]) -> Float[Tensor, "P *K"]:
    """For each prompt p, the mean over all other prompts. P = 1: nan (0/0)."""
    return (values.sum(0) - values) / torch.tensor(len(values) - 1, dtype=torch.float64, device=values.device)


def jackknife_ratio(prompt_tops: Float[Tensor, "P"], prompt_bottoms: Float[Tensor, "P"]) -> Estimate:
    """A ratio of sums over the prompts of one step, stderr by the jackknife, P - 1 degrees of freedom; 0/0: nan."""
    tops, bottoms = prompt_tops.double(), prompt_bottoms.double()
    left_out = means_without_one(tops) / means_without_one(bottoms)
    variance = jackknife_covariance(left_out[:, None])
    return Estimate(float(tops.sum() / bottoms.sum()), float(variance.sqrt()), float(len(tops) - 1), len(tops))


def jackknife_covariance(left_out: Float[Tensor, "P K"]) -> Float[Tensor, "K K"]:
    """(P-1)/P sum_p (v_-p - mean)(v_-p - mean)', the covariance of the errors of K quantities; P < 2: nan.

    Exact for means, conservative in expectation for U-statistics. Source: Efron and Stein, Ann. Statist. 9 (1981) 586.
    """
    num_prompts = len(left_out)
    if num_prompts < 2:
        return left_out.new_full((left_out.shape[1],) * 2, math.nan, dtype=torch.float64)
    centred = left_out.double() - left_out.double().mean(0)
    return (num_prompts - 1) / num_prompts * centred.T @ centred
