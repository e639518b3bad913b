"""Running moments against the pairs themselves, and intervals against simulation with known truth."""

import functools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trl_entropy.estimators.statistics.moments import PairMoments, error_covariance, jackknife, statistics_of_all

STATISTICS = ["slope", "corrected_slope", "correlation", "r_squared", "ceiling_r_squared", "share_of_ceiling"]


def moments_of(pairs):
    return functools.reduce(lambda moments, pair: moments.update(*map(float, pair)), pairs, PairMoments.empty())


def random_pairs(count=30, noise=0.3, slope=0.8, shared=0.0, seed=0):
    """(x, y, stderr of x, stderr of y, error covariance) with truth y* = slope x*, errors with a shared part."""
    generator = torch.Generator().manual_seed(seed)
    truth, own_x, own_y, common = torch.randn(4, count, dtype=torch.float64, generator=generator)
    scale = torch.linspace(0.5, 1.5, count, dtype=torch.float64)
    x = truth + noise * scale * own_x + shared * common
    y = slope * truth + noise * scale * own_y + shared * common
    stderr = (noise**2 * scale.square() + shared**2).sqrt()
    return torch.stack([x, y, stderr, stderr, torch.full_like(x, shared**2)], 1)


def test_statistics_against_the_pairs_themselves():
    pairs = random_pairs(shared=0.2)
    x, y = pairs[:, 0], pairs[:, 1]
    covariance = torch.cov(pairs[:, :2].T)
    error_xx, error_xy = pairs[:, 2].square().mean(), pairs[:, 4].mean()
    moments = moments_of(pairs)
    design = torch.stack([torch.ones_like(x), x], 1)
    fit = torch.linalg.lstsq(design, y[:, None]).solution.flatten()
    residual = (y - design @ fit).square().sum() / (y - y.mean()).square().sum()
    assert moments.slope().value == pytest.approx(float(fit[1]))
    assert moments.r_squared().value == pytest.approx(1 - float(residual))
    assert moments.correlation().value == pytest.approx(float(torch.corrcoef(pairs[:, :2].T)[0, 1]))
    corrected = (covariance[0, 1] - error_xy) / (covariance[0, 0] - error_xx)
    assert moments.corrected_slope().value == pytest.approx(float(corrected))
    share = moments.r_squared().value / moments.ceiling_r_squared().value
    assert moments.share_of_ceiling().value == pytest.approx(share)
    assert (moments.num_pairs, moments.slope().num_samples, moments.slope().dof) == (30, 30, 28.0)


def test_many_sets_at_once_are_as_each_by_itself():
    """Of as many pairs as there are, down to one, which has neither a slope nor an error."""
    sets = [
        moments_of(random_pairs(count, noise)) for count, noise in ((30, 0.3), (3, 0.1), (12, 2.0), (2, 0.3), (1, 0.3))
    ]
    names = STATISTICS[:-1]
    for moments, found in zip(sets, statistics_of_all(sets, names), strict=True):
        for name in names:
            expected = getattr(moments, name)()
            assert found[name].value == pytest.approx(expected.value, nan_ok=True)
            assert found[name].stderr == pytest.approx(expected.stderr, nan_ok=True)
            assert (found[name].dof, found[name].num_samples) == (expected.dof, expected.num_samples)


def test_slope_error_is_the_sandwich():
    """stderr^2 = sum (x - xbar)^2 e^2 / (sum (x - xbar)^2)^2 * n/(n-2), e the residuals."""
    x, y = random_pairs()[:, :2].T
    centred = x - x.mean()
    slope = (centred * y).sum() / centred.square().sum()
    residuals = y - y.mean() - slope * centred
    expected = (centred * residuals).square().sum().sqrt() / centred.square().sum() * math.sqrt(30 / 28)
    assert moments_of(random_pairs()).slope().stderr == pytest.approx(float(expected))


@pytest.mark.parametrize("statistic", STATISTICS)
def test_stderr_is_the_derivative_by_weights_of_pairs(statistic):
    """Slow oracle: the infinitesimal jackknife, by giving one pair a little more weight at a time."""
    pairs, step, count = random_pairs(shared=0.2, seed=1), 1e-6, 30
    singles = [moments_of(pair[None]).sums for pair in pairs]
    total = sum(singles)

    def value(sums):
        n = float(sums[0, 0])
        return getattr(PairMoments(sums * (count / n)), statistic)().value

    influence = [(value(total + step * s) - value(total - step * s)) / (2 * step) for s in singles]
    expected = math.sqrt(sum(v * v for v in influence) * count / (count - 2))
    assert getattr(PairMoments(total), statistic)().stderr == pytest.approx(expected, rel=1e-5)


@given(st.integers(0, 30), st.permutations(range(30)))
def test_merge_and_order_change_nothing(cut, order):
    pairs = random_pairs(shared=0.1)
    whole, shuffled = moments_of(pairs), pairs[order]
    merged = moments_of(shuffled[:cut]).merge(moments_of(shuffled[cut:]))
    torch.testing.assert_close(merged.sums, whole.sums, rtol=1e-12, atol=1e-12)
    assert merged.share_of_ceiling().stderr == pytest.approx(whole.share_of_ceiling().stderr, rel=1e-8)


def test_noise_in_x_flattens_the_slope_and_the_correction_undoes_it():
    """Many pairs, errors partly shared: the plain slope tends to (slope + shared)/(1 + noise), the other to slope."""
    pairs = random_pairs(count=20_000, noise=0.6, shared=0.3, seed=2)
    x, y, x_stderr, y_stderr, covariance = pairs.T
    rows = torch.stack([x.new_ones(len(x)), x, y, x * x, x * y, y * y, x_stderr**2, covariance, y_stderr**2], 1)
    moments = PairMoments(rows.T @ rows)
    assert torch.allclose(moments_of(pairs[:50]).sums, rows[:50].T @ rows[:50])
    noise = float(pairs[:, 2].square().mean())
    plain, corrected = moments.slope(), moments.corrected_slope()
    assert abs(plain.value - (0.8 + 0.09) / (1 + noise)) < 4 * plain.stderr
    assert abs(corrected.value - 0.8) < 4 * corrected.stderr
    assert abs(plain.value - 0.8) > 10 * plain.stderr
    share = moments.share_of_ceiling()
    assert abs(share.value - 1) < 4 * share.stderr
    assert moments.ceiling_r_squared().value < 0.7


def test_unrelated_predictions_have_no_slope():
    pairs = random_pairs(count=200, slope=0.0)
    low, high = moments_of(pairs).corrected_slope().interval()
    assert low < 0 < high
    assert high - low < 0.3


def test_jackknife_leaves_out_one_pair_at_a_time():
    pairs = random_pairs(count=12)
    estimate = jackknife([moments_of(pair[None]) for pair in pairs], PairMoments.corrected_slope)
    values = [moments_of(torch.cat([pairs[:i], pairs[i + 1 :]])).corrected_slope().value for i in range(12)]
    mean = sum(values) / 12
    assert estimate.stderr == pytest.approx(math.sqrt(11 / 12 * sum((v - mean) ** 2 for v in values)))
    assert (estimate.value, estimate.dof) == (moments_of(pairs).corrected_slope().value, 10.0)


@pytest.mark.slow
def test_jackknife_intervals_of_the_corrected_slope_cover_when_early_steps_dominate():
    covered, reps = 0, 400
    for seed in range(reps):
        pairs = random_pairs(count=20, slope=1.0, seed=seed)
        pairs[:, :4] *= torch.logspace(0, -0.7, 20, dtype=torch.float64)[:, None]
        low, high = jackknife([moments_of(pair[None]) for pair in pairs], PairMoments.corrected_slope).interval()
        covered += low <= 1 <= high
    assert abs(covered / reps - 0.95) < 0.02 + 3 * math.sqrt(0.95 * 0.05 / reps)


def test_error_covariance_from_a_paired_difference():
    errors = torch.randn(2, 100, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    errors[1] += 0.5 * errors[0]
    stderrs = [float(e.std()) for e in (errors[0], errors[1], errors[0] - errors[1])]
    assert error_covariance(*stderrs) == pytest.approx(float(torch.cov(errors)[0, 1]))


def test_few_pairs():
    assert math.isnan(PairMoments.empty().slope().value)
    two = moments_of([(0.0, 0.0), (1.0, 2.0)]).slope()
    assert (two.value, two.dof) == (2.0, 0.0)
    assert math.isnan(two.stderr)


def test_errors_beyond_the_variance_leave_no_ceiling():
    assert math.isnan(moments_of([(0.0, 0.0, 9.0), (1.0, 2.0, 9.0), (2.0, 1.0, 9.0)]).ceiling_r_squared().value)


def test_errors_beyond_the_variance_of_both_values_leave_no_ceiling_either():
    """The product of two negative variances is positive: a run once logged a ceiling of 386 over three steps."""
    pairs = [(0.0, 0.0, 9.0, 9.0), (1.0, 2.0, 9.0, 9.0), (2.0, 1.0, 9.0, 9.0)]
    alone = moments_of(pairs).ceiling_r_squared()
    together = statistics_of_all([moments_of(pairs)], ["r_squared", "ceiling_r_squared"])[0]
    assert math.isnan(alone.value) and math.isnan(together["ceiling_r_squared"].value)
    assert together["r_squared"].value == pytest.approx(0.25) and math.isfinite(together["r_squared"].stderr)


@pytest.mark.parametrize("seed", range(20))
def test_a_ceiling_is_nan_or_a_squared_correlation(seed):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(3, 2, dtype=torch.float64, generator=generator)
    errors = torch.rand(3, 2, dtype=torch.float64, generator=generator)
    shared = (2 * torch.rand(3, 1, dtype=torch.float64, generator=generator) - 1) * errors.prod(dim=1, keepdim=True)
    found = moments_of(torch.cat([values, errors, shared], dim=1)).ceiling_r_squared().value
    assert math.isnan(found) or 0 <= found <= 1
