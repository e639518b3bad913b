"""Intervals of means and ratios over prompts, for any values and for shares, which lie between 0 and 1.

Prompts are taken as independent draws; what belongs to one prompt may depend on one another in any way. With few
prompts Student's t makes up for an estimated spread, but not for skewed values: docs/intervals.md has the coverage.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from trl_entropy.estimators.statistics.pooled import means_without_one
from trl_entropy.estimators.statistics.student_t import student_t_quantile


def ratio_intervals(
    numerators: Float[Tensor, "P K"], denominators: Float[Tensor, "P K"], confidence: float = 0.95
) -> Float[Tensor, "K 2"]:
    """Student's t intervals of K ratios sum(numerator) / sum(denominator), by the jackknife over prompts.

    Args:
        numerators: a value for each prompt, or its sum over the prompt's tokens or samples.
        denominators: the prompt's number of tokens or samples; with ones the ratio is a mean over prompts. A prompt
            with 0 has no part in that ratio, and does not count in its degrees of freedom, the number of prompts less
            one.
        confidence: of the intervals.

    Returns:
        Both ends of each interval; nan for fewer than two prompts. Where all prompts agree it has no width.
    """
    values, stderrs, num_prompts = _ratios(numerators, denominators)
    margin = _quantiles(num_prompts, confidence) * stderrs
    return torch.stack([values - margin, values + margin], 1)


def share_intervals(
    numerators: Float[Tensor, "P K"], denominators: Float[Tensor, "P K"], confidence: float = 0.95
) -> Float[Tensor, "K 2"]:
    """Wilson's intervals of K shares: all s with |share - s| <= t sqrt(s (1-s) / n), within 0 and 1.

    n = share (1 - share) / stderr^2 is the number of independent trials that would have the stated error, and the
    number of prompts where all agree; t is Student's, with the number of prompts less one. So the interval has a width
    even if every problem was solved. Arguments and returned values are as of `ratio_intervals`, where each value lies
    between 0 and its denominator.

    Source: Korn and Graubard, Survey Methodology 24 (1998) 193; Franco et al., J. Survey Statistics and Methodology 7
    (2019) 334, who compare it with Wilson's form.
    """
    shares, stderrs, num_prompts = _ratios(numerators, denominators)
    trials = torch.where(stderrs > 0, shares * (1 - shares) / stderrs.square(), num_prompts)
    t_sq = _quantiles(num_prompts, confidence).square()
    centre = (shares + t_sq / (2 * trials)) / (1 + t_sq / trials)
    margin = (t_sq * (shares * (1 - shares) / trials + t_sq / (4 * trials.square()))).sqrt() / (1 + t_sq / trials)
    low = torch.where(shares == 0, 0.0, centre - margin)  # exact solutions, which rounding would put inside
    high = torch.where(shares == 1, 1.0, centre + margin)
    return torch.stack([low, high], 1).where(num_prompts[:, None] > 1, math.nan)


def _ratios(
    numerators: Float[Tensor, "P K"], denominators: Float[Tensor, "P K"]
) -> tuple[Float[Tensor, "K"], Float[Tensor, "K"], Float[Tensor, "K"]]:
    """K ratios, their standard errors by the jackknife, and the number of prompts that have a part in each."""
    tops, bottoms = numerators.double(), denominators.double()
    counted = bottoms != 0
    num_prompts = counted.sum(0).double()
    left_out = means_without_one(tops) / means_without_one(bottoms)
    mean = left_out.where(counted, 0.0).sum(0) / num_prompts
    squares = (left_out - mean).square().where(counted, 0.0).sum(0)
    return tops.sum(0) / bottoms.sum(0), ((num_prompts - 1) / num_prompts * squares).sqrt(), num_prompts


def _quantiles(num_prompts: Float[Tensor, "K"], confidence: float) -> Float[Tensor, "K"]:
    dofs = (num_prompts - 1).tolist()
    return torch.tensor([student_t_quantile(0.5 + confidence / 2, dof) for dof in dofs], dtype=torch.float64)
