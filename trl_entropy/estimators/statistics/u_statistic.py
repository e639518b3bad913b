"""The inner product of two mean gradients that come from the same prompts, and its variance.

Rows X_n, Y_n (P, D) are what prompt group n contributes: its entropy-gradient term, and P times its share of the loss
gradient. Everything is a function of the Gram matrix `gram[n, m]` = X_n' M Y_m, with M the diagonal of the optimizer's
metric *before* the step, since after it M depends on the sample. Groups must be independent of one another.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from trl_entropy.estimators.statistics.estimate import Estimate

_GRAM_COLUMNS = 2**22


def cross_gram(
    x: Float[Tensor, "P D"], y: Float[Tensor, "Q D"], preconditioner: Float[Tensor, "D"] | None = None
) -> Float[Tensor, "P Q"]:
    """X_n' M Y_m in float64, `_GRAM_COLUMNS` columns at a time; M = 1 by default. Cost O(P Q D)."""
    gram = x.new_zeros(len(x), len(y), dtype=torch.float64)
    metric = x.new_ones(x.shape[1]) if preconditioner is None else preconditioner
    for part, other, weights in zip(*(rows.split(_GRAM_COLUMNS, dim=-1) for rows in (x, y, metric)), strict=True):
        gram += (part.double() * weights.double()) @ other.double().T
    return gram


def u_statistic(gram: Float[Tensor, "P P"]) -> float:
    """(T17): the mean of X_n' M Y_m over pairs of *different* groups, unbiased for E[X]' M E[Y].

    U = P/(P-1) Xbar'M Ybar - 1/(P(P-1)) sum_n X_n'M Y_n. Unbiased if the h and E[T] in X_n are given; with
    their estimates from the same groups it is a ratio with bias O(1/P). P < 2: nan. Source: Hoeffding (1948).
    """
    return float(row_means(gram).mean())


def row_means(gram: Float[Tensor, "P P"]) -> Float[Tensor, "P"]:
    """(T17): r_n = (X_n'M Ybar_-n + Y_n'M Xbar_-n) / 2, Ybar_-n the mean without group n. Their mean is U."""
    gram = gram.double()
    self_products = gram.diagonal()
    return row_means_from_products(self_products, gram.mean(1), gram.mean(0))


def row_means_from_products(
    self_products: Float[Tensor, "P"], x_dot_mean_y: Float[Tensor, "P"], y_dot_mean_x: Float[Tensor, "P"]
) -> Float[Tensor, "P"]:
    """(T17): r_n from X_n'M Y_n, X_n'M Ybar and Y_n'M Xbar, without products of pairs: cost O(P D)."""
    num_prompts = len(self_products)
    both = x_dot_mean_y.double() + y_dot_mean_x.double()
    excess = num_prompts * both / 2 - self_products.double()
    return excess / torch.tensor(num_prompts - 1, dtype=torch.float64)


def u_statistic_variance(gram: Float[Tensor, "P P"]) -> float:
    """(T17): the variance of U, unbiased for P >= 4 (else nan), and therefore sometimes negative.

    Var(U) = 4(P-2) zeta_1/(P(P-1)) + 2 zeta_2/(P(P-1)). With s2 the sample variance of the r_n and q the mean of
    (k_nm - U)^2 over pairs, zeta_2 = q + Var(U) and zeta_1 = ((P-1)^2 s2/(P-2) - zeta_2)/(P-4); solved for Var(U):
    (4 (P-1)^2 s2 - 2 P q) / (P(P-2)(P-3)), which has no pole at P = 4.
    """
    num_prompts = len(gram)
    if num_prompts < 4:
        return math.nan
    between_rows = 4 * (num_prompts - 1) ** 2 * float(row_means(gram).var())
    between_pairs = 2 * num_prompts * _pair_variance(gram)
    return (between_rows - between_pairs) / (num_prompts * (num_prompts - 2) * (num_prompts - 3))


def jackknife_variance(row_means: Float[Tensor, "P"]) -> float:
    """(T17): the variance of U without products of pairs; conservative, twice too large where noise dominates.

    (P-1)/P sum_n (U_-n - mean)^2 with U_-n = (P U - 2 r_n)/(P - 2), that is 4 (P-1)^2 s2 / (P (P-2)^2); P < 3: nan.
    """
    num_prompts = len(row_means)
    if num_prompts < 3:
        return math.nan
    return 4 * (num_prompts - 1) ** 2 / (num_prompts * (num_prompts - 2) ** 2) * float(row_means.double().var())


def u_statistic_estimate(gram: Float[Tensor, "P P"]) -> Estimate:
    """(T17): U with the unbiased standard error, nan where the estimated variance is negative. P - 1 dof."""
    return _estimate(u_statistic(gram), u_statistic_variance(gram), float(len(gram) - 1), len(gram))


def u_statistic_jackknife_estimate(row_means: Float[Tensor, "P"]) -> Estimate:
    """(T17): U with the conservative standard error of the jackknife, from vectors (P,) alone. P - 1 dof."""
    num_prompts = len(row_means)
    value = float(row_means.double().mean())
    return _estimate(value, jackknife_variance(row_means), float(num_prompts - 1), num_prompts)


def _pair_variance(gram: Float[Tensor, "P P"]) -> float:
    """q, the mean over pairs n < m of (k_nm - U)^2."""
    gram = gram.double()
    kernel = (gram + gram.T) / 2
    first, second = torch.triu_indices(*gram.shape, offset=1)
    return float((kernel[first, second] - u_statistic(gram)).square().mean())


def _estimate(value: float, variance: float, dof: float, num_samples: int) -> Estimate:
    return Estimate(value, math.sqrt(variance) if variance >= 0 else math.nan, dof, num_samples)
