"""Quantiles of Student's t distribution. Imports no torch, so that readers of a run share them."""

import math
from functools import lru_cache
from statistics import NormalDist


@lru_cache
def student_t_quantile(probability: float, dof: float) -> float:
    """The t with P(T <= t) = probability for Student's T with `dof` > 0 degrees of freedom, not only whole numbers.

    Newton's method within a bracket on P(|T| > t) = I_x(dof/2, 1/2), x = dof/(dof + t^2); dof = inf is the normal
    distribution, dof <= 0 or nan has no quantile (nan). Absolute error about 2e-11 (1 + |t|) for dof <= 1e6.
    """
    if not dof > 0:
        return math.nan
    if math.isinf(dof):
        return NormalDist().inv_cdf(probability)
    tail, a = 2 * min(probability, 1 - probability), dof / 2
    log_beta = math.lgamma(a) + math.lgamma(0.5) - math.lgamma(a + 0.5)
    if tail == 1:
        return 0.0
    low, high, x = 0.0, 1.0, 0.5
    while low < x < high:
        excess = _regularized_incomplete_beta(a, 0.5, x) - tail
        low, high = (x, high) if excess < 0 else (low, x)
        slope = math.exp((a - 1) * math.log(x) - 0.5 * math.log1p(-x) - log_beta)
        step = excess / slope if slope else math.inf
        if x - step == x:
            break
        x = x - step if low < x - step < high else (low + high) / 2
    return math.copysign(math.sqrt(dof * (1 - x) / x), probability - 0.5)


def _regularized_incomplete_beta(a: float, b: float, x: float) -> float:
    """I_x(a, b) by its continued fraction on the side where that converges fast (DLMF 8.17.22 and 8.17.4)."""
    if x > (a + 1) / (a + b + 2):
        return 1.0 - _regularized_incomplete_beta(b, a, 1.0 - x)
    log_beta = math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)
    front = math.exp(a * math.log(x) + b * math.log1p(-x) - log_beta) / a
    return front * _beta_continued_fraction(a, b, x)


def _beta_continued_fraction(a: float, b: float, x: float) -> float:
    """1/(1 + d_1/(1 + d_2/(1 + ...))), evaluated backward from a depth at which the tail no longer counts."""
    depth = 60 + int(8 * math.sqrt(max(a, b)))
    fraction = 1.0
    for n in range(depth, 0, -1):
        m = n // 2
        if n % 2:
            coefficient = -(a + m) * (a + b + m) / ((a + 2 * m) * (a + 2 * m + 1))
        else:
            coefficient = m * (b - m) / ((a + 2 * m - 1) * (a + 2 * m))
        fraction = 1.0 + coefficient * x / fraction
    return 1.0 / fraction
