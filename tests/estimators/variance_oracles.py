"""The noise scale's parts from norms or from all pairs, and variances of inner products (T17), (T18), for tests."""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from trl_entropy.estimators.noise.noise_scale import NoiseParts, jackknifed_parts, noise_parts_two_sizes
from trl_entropy.estimators.statistics.estimate import Estimate
from trl_entropy.estimators.statistics.pooled import StepParts
from trl_entropy.estimators.statistics.u_statistic import (
    jackknife_variance,
    row_means,
    u_statistic,
    u_statistic_variance,
)


def noise_parts(group_sq_norms: Float[Tensor, "P"], batch_sq_norm: float) -> NoiseParts:
    """(T14): |G|^2 = (P |g|^2 - mean_n |Y_n|^2)/(P-1), tr(Sigma) = P/(P-1) (mean_n |Y_n|^2 - |g|^2), from one batch.

    `group_sq_norms` are |Y_n|^2 and `batch_sq_norm` |g|^2, in squared units of the gradient or of the metric (T16).
    Unbiased if groups are independent and identically distributed. P = 1: nan.
    Source: McCandlish et al., arXiv:1812.06162, A.1, with group and batch as the two sizes.
    """
    num_prompts = len(group_sq_norms)
    return noise_parts_two_sizes(group_sq_norms, batch_sq_norm, 1, num_prompts)


def unbiased_parts(gram: Float[Tensor, "P P"], half_products: Float[Tensor, "P"] | None = None) -> StepParts:
    """(T14), (T17): as `jackknifed_parts`, from all products Y_n . Y_m, with an unbiased covariance; P < 4: nan.

    Only the variance of |G|^2 is overstated by the jackknife, and enters the other parts with the opposite sign. One
    step's variance may come out negative; it is for pooling.
    """
    gram = gram.double()
    parts = jackknifed_parts(gram.diagonal(), gram.mean(1), half_products)
    excess = jackknife_variance(row_means(gram)) - u_statistic_variance(gram)
    signs = -torch.ones_like(parts.values)
    signs[0] = 1.0
    return parts._replace(covariance=parts.covariance - excess * signs.outer(signs))


class ZetaComponents(NamedTuple):
    """(T17): Hoeffding's variances of the symmetric kernel k_nm = (X_n' M Y_m + X_m' M Y_n) / 2.

    `zeta_1` is the variance of its mean given one group, `zeta_2` its variance over pairs. Estimates are unbiased and
    may be negative.
    """

    zeta_1: float
    zeta_2: float


def zeta_components(gram: Float[Tensor, "P P"]) -> ZetaComponents:
    """(T17): zeta_1 and zeta_2, unbiased for P >= 4 (else nan); zeta_1 near 0 says that noise dominates."""
    num_prompts, variance = len(gram), u_statistic_variance(gram)
    first, second = torch.triu_indices(num_prompts, num_prompts, offset=1)
    kernel = ((gram + gram.T) / 2)[first, second].double()
    pair_variance = float((kernel - u_statistic(gram)).square().mean())
    zeta_2 = pair_variance + variance
    zeta_1 = (num_prompts * (num_prompts - 1) * variance - 2 * zeta_2) / (4 * (num_prompts - 2))
    return ZetaComponents(zeta_1, zeta_2)


def independent_batches_variance(gram: Float[Tensor, "P Q"]) -> float:
    """(T18): the variance of Xbar'M Ybar over fresh draws of both batches; unbiased, negative at times.

    y'Sx y/P + x'Sy x/Q - tr(Sx Sy)/(P Q) with the sample means for x, y: they contain tr(Sx Sy) twice, so that it is
    subtracted, where the population means would have it added. P < 2 or Q < 2: nan.
    """
    gram = gram.double()
    num_x, num_y = gram.shape
    centred = gram - gram.mean(0) - gram.mean(1, keepdim=True) + gram.mean()
    trace = centred.square().sum() / torch.tensor((num_x - 1) * (num_y - 1), dtype=torch.float64)
    return float(gram.mean(1).var() / num_x + gram.mean(0).var() / num_y - trace / (num_x * num_y))


def independent_batches_estimate(gram: Float[Tensor, "P Q"]) -> Estimate:
    """(T18): Xbar'M Ybar of two independent batches of P and Q groups, with its error over fresh draws of both.

    stderr is nan where the estimated variance is negative. Degrees of freedom after Satterthwaite, from the smaller of
    P - 1 and Q - 1 up to their sum; `num_samples` = P + Q. This is not the error of a prediction for a given update:
    that is (T8b).
    """
    gram = gram.double()
    num_x, num_y = gram.shape
    over_x, over_y = gram.mean(1).var() / num_x, gram.mean(0).var() / num_y
    dof = (over_x + over_y).square() / (over_x.square() / (num_x - 1) + over_y.square() / (num_y - 1))
    variance = independent_batches_variance(gram)
    stderr = math.sqrt(variance) if variance >= 0 else math.nan
    return Estimate(float(gram.mean()), stderr, float(dof), num_x + num_y)
