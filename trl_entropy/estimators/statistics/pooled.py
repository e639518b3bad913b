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

from trl_entropy.estimators.statistics.estimate import Estimate, student_t_quantile


class StepParts(NamedTuple):
    """K quantities of one step, the covariance of their errors, and the number of its prompts."""

    values: Float[Tensor, "K"]
    covariance: Float[Tensor, "K K"]
    num_prompts: int


@dataclass(frozen=True)
class PooledParts:
    """Sums over steps of K quantities, of the covariance of their errors, and of counts; two such sums can be added.

    They estimate the sum (or mean) over exactly these steps, each at its own parameters; the error is over fresh
    prompts and completions. `dof` = sum over steps of P - 1. A step with a nan makes everything nan, so leave it out.
    """

    values: Float[Tensor, "K"]
    covariance: Float[Tensor, "K K"]
    num_steps: int
    num_samples: int
    dof: float

    @classmethod
    def empty(cls, num_parts: int) -> "PooledParts":
        """The sums over no steps."""
        zeros = torch.zeros(num_parts, num_parts, dtype=torch.float64)
        return cls(zeros.sum(0), zeros, 0, 0, 0.0)

    def update(self, step: StepParts) -> "PooledParts":
        """The sums with one step added; all steps have the same weight, and `num_samples` counts prompts."""
        values, covariance = step.values.double().cpu(), step.covariance.double().cpu()
        return self.merge(PooledParts(values, covariance, 1, step.num_prompts, float(step.num_prompts - 1)))

    def merge(self, other: "PooledParts") -> "PooledParts":
        """The sums over both sets of steps."""
        return PooledParts(
            self.values + other.values,
            self.covariance + other.covariance,
            self.num_steps + other.num_steps,
            self.num_samples + other.num_samples,
            self.dof + other.dof,
        )

    def mean(self, weights: Float[Tensor, "K"]) -> Estimate:
        """The mean over steps of a linear combination of the parts; as unbiased as they are. No steps: nan (0/0)."""
        count = torch.tensor(self.num_steps, dtype=torch.float64)
        variance = weights @ self.covariance @ weights
        return self._estimate(weights @ self.values / count, variance / count.square())

    def ratio(self, numerator: Float[Tensor, "K"], denominator: Float[Tensor, "K"]) -> Estimate:
        """The ratio of two linear combinations, stderr by the delta method; bias O(1/(steps P)), 0/0: nan.

        Where the denominator is within a few standard errors of 0 the stderr has no meaning; use `ratio_interval`.
        """
        top, bottom = numerator @ self.values, denominator @ self.values
        weights = (numerator - top / bottom * denominator) / bottom
        return self._estimate(top / bottom, weights @ self.covariance @ weights)

    def ratio_interval(
        self, numerator: Float[Tensor, "K"], denominator: Float[Tensor, "K"], confidence: float = 0.95
    ) -> tuple[float, float]:
        """Fieller's confidence interval of the ratio: all rho with |numerator - rho denominator| <= t stderr.

        It keeps its coverage however small the denominator is. Where the denominator is consistent with 0 no bounded
        interval can do so, and it is (-inf, inf). Without errors: nan. Source: E. C. Fieller, J. Roy. Statist. Soc. B
        16 (1954) 175.
        """
        both = torch.stack([numerator, denominator])
        quantile = student_t_quantile(0.5 + confidence / 2, self.dof)
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

    def _estimate(self, value: Float[Tensor, ""], variance: Float[Tensor, ""]) -> Estimate:
        return Estimate(float(value), float(variance.sqrt()), self.dof, self.num_samples)


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


def jackknife_covariance(left_out: Float[Tensor, "P K"]) -> Float[Tensor, "K K"]:
    """(P-1)/P sum_p (v_-p - mean)(v_-p - mean)', the covariance of the errors of K quantities; P < 2: nan.

    Exact for means, conservative in expectation for U-statistics. Source: Efron and Stein, Ann. Statist. 9 (1981) 586.
    """
    num_prompts = len(left_out)
    if num_prompts < 2:
        return left_out.new_full((left_out.shape[1],) * 2, math.nan, dtype=torch.float64)
    centred = left_out.double() - left_out.double().mean(0)
    return (num_prompts - 1) / num_prompts * centred.T @ centred
