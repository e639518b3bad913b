"""Coverage of simulated normals, where it is known; Wilson's interval by its own equation."""

import math
from statistics import NormalDist

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trl_entropy.estimators.statistics.calibration import coverage, kurtosis, wilson_interval
from trl_entropy.estimators.statistics.estimate import Estimate

NORMAL = NormalDist()


def normals(num, *, stderr=1.0, shift=0.0):
    """Redraws of a standard normal estimate around `shift`, with a stated error that may be wrong."""
    values = torch.randn(num, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + shift
    return [Estimate(float(value), stderr, math.inf, 1) for value in values]


@pytest.mark.parametrize("stderr", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("confidence", [0.8, 0.95])
def test_coverage_of_normals_with_a_stated_error_right_or_wrong(stderr, confidence):
    result = coverage(normals(20_000, stderr=stderr), 0.0, confidence)
    expected = 2 * NORMAL.cdf(stderr * NORMAL.inv_cdf(0.5 + confidence / 2)) - 1
    assert result.covered == pytest.approx(expected, abs=4 * math.sqrt(expected * (1 - expected) / 20_000))
    assert result.covered_low < result.covered < result.covered_high
    assert (result.stderr_ratio, result.rms_stderr_ratio) == (pytest.approx(stderr, rel=0.02),) * 2
    assert result.scatter_stderr / result.scatter == pytest.approx(1 / math.sqrt(2 * 20_000), rel=0.05)
    assert abs(result.bias_ratio) < 0.03


def test_t_intervals_cover_where_normal_ones_do_not():
    """Means of 5 normals with their own standard error: the t interval is exact, the normal one covers 87.8 %."""
    samples = torch.randn(20_000, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    rows = list(zip(samples.mean(1).tolist(), (samples.std(1) / math.sqrt(5)).tolist(), strict=True))
    exact, normal = (coverage([Estimate(*row, dof, 5) for row in rows], 0.0).covered for dof in (4.0, math.inf))
    assert exact == pytest.approx(0.95, abs=0.006)
    # P(|t_4| < z) in closed form, with sin(a) = z / sqrt(4 + z^2).
    sine = (z := NORMAL.inv_cdf(0.975)) / math.sqrt(4 + z * z)
    assert normal == pytest.approx(1.5 * sine - 0.5 * sine**3, abs=0.009)


def test_the_sides_on_which_intervals_miss():
    result = coverage(normals(20_000, shift=1.0), 0.0)
    z = NORMAL.inv_cdf(0.975)
    assert result.missed_above == pytest.approx(1 - NORMAL.cdf(z - 1), abs=0.012)
    assert result.missed_below == pytest.approx(NORMAL.cdf(-z - 1), abs=0.003)
    assert result.covered + result.missed_above + result.missed_below == pytest.approx(1.0)
    assert result.bias == pytest.approx(1.0, abs=0.03)


def test_redraws_without_a_standard_error_are_counted_apart():
    known = normals(100)
    unknown = [Estimate(1e6, math.nan, 7.0, 1)] * 3
    mixed, clean = coverage([*unknown, *known], 0.0), coverage(known, 0.0)
    assert (mixed.num_redraws, mixed.num_without_stderr) == (100, 3)
    assert mixed.covered == clean.covered and mixed.scatter == clean.scatter and mixed.bias == clean.bias
    with pytest.raises(ValueError, match="1 of 4 redraws have a standard error"):
        coverage([*unknown, known[0]], 0.0)


def test_stated_errors_that_vary_have_two_means():
    estimates = [Estimate(value, stderr, math.inf, 1) for value, stderr in ((-1.0, 1.0), (1.0, 3.0))]
    result = coverage(estimates, 0.0)
    assert (result.mean_stderr, result.rms_stderr) == (2.0, pytest.approx(math.sqrt(5)))
    assert result.scatter == pytest.approx(math.sqrt(2))


@given(st.integers(1, 5000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))), st.floats(0.5, 0.999))
def test_wilson_bounds_solve_its_equation(counts, confidence):
    hits, num = counts
    z = NORMAL.inv_cdf(0.5 + confidence / 2)
    low, high = wilson_interval(hits, num, confidence)
    assert 0 <= low <= hits / num <= high <= 1
    for p in (low, high):
        assert (hits / num - p) ** 2 == pytest.approx(z * z * p * (1 - p) / num, rel=1e-6, abs=1e-12)


def test_wilson_at_the_edges():
    assert wilson_interval(0, 10)[1] == pytest.approx(0.2775, abs=1e-4)  # z^2 / (n + z^2)
    assert wilson_interval(10, 10)[0] == pytest.approx(1 - 0.2775, abs=1e-4)
    assert all(math.isnan(bound) for bound in wilson_interval(0, 0))


@pytest.mark.parametrize("share", [0.5, 0.01])
def test_kurtosis_of_a_coin(share):
    """(1 - 3 p q) / (p q) in closed form, and the spread of variances that it foretells."""
    num = 10_000
    values = (torch.arange(num) < share * num).double()
    assert kurtosis(7.0 - 3.0 * values) == pytest.approx((1 - 3 * share * (1 - share)) / (share * (1 - share)))
    samples = torch.randn(20_000, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) ** 2
    spread = samples.var(1).std() / samples.var(1).mean()
    assert float(spread) == pytest.approx(math.sqrt((15.0 - 1) / 50), rel=0.1)  # chi squared, 1 dof: kurtosis 15
