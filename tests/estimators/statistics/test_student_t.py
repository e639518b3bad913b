"""The t quantile against the integral of the density."""

import math

import pytest
import torch

from trl_entropy.estimators.statistics.student_t import student_t_quantile


def student_t_cdf(t, dof):
    """1/2 plus the integral of the density from 0 to t, by Simpson's rule in s = atan(x / sqrt(dof))."""
    s = torch.linspace(0, math.atan(abs(t) / math.sqrt(dof)), 20_001, dtype=torch.float64)
    log_constant = math.lgamma((dof + 1) / 2) - math.lgamma(dof / 2) - math.log(math.pi) / 2
    density = (dof - 1) * s.cos().log() + log_constant
    weights = torch.full_like(s, 2.0)
    weights[1::2], weights[0], weights[-1] = 4.0, 1.0, 1.0
    return 0.5 + math.copysign(float((weights * density.exp()).sum() * (s[1] - s[0]) / 3), t)


@pytest.mark.parametrize("dof", [1.0, 2.0, 2.5, 7.0, 31.0, 127.0, 2000.0, 1e5])
@pytest.mark.parametrize("probability", [0.025, 0.4, 0.6, 0.9, 0.975, 0.99995])
def test_t_quantile_inverts_the_integral_of_the_density(probability, dof):
    assert student_t_cdf(student_t_quantile(probability, dof), dof) == pytest.approx(probability, abs=1e-10)


def test_t_quantile_closed_forms_and_limits():
    assert student_t_quantile(0.975, 1.0) == pytest.approx(math.tan(0.475 * math.pi), rel=1e-13)  # Cauchy
    assert student_t_quantile(0.975, 2.0) == pytest.approx(0.95 * math.sqrt(2 / (1 - 0.95**2)), rel=1e-13)
    assert student_t_quantile(0.5, 5.0) == pytest.approx(0.0, abs=1e-15)
    assert student_t_quantile(0.975, 1e6) == pytest.approx(student_t_quantile(0.975, math.inf), rel=2e-6)
    assert 0.5 * (1 + math.erf(student_t_quantile(0.9, math.inf) / math.sqrt(2))) == pytest.approx(0.9, abs=1e-12)
    assert all(math.isnan(student_t_quantile(0.975, dof)) for dof in (0.0, -1.0, math.nan))
