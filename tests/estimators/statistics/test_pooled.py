"""Pooled sums, their covariance and Fieller's interval, against what they are by definition."""

import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from trl_entropy.estimators.statistics.pooled import PooledParts, StepParts, jackknife_covariance, sum_over_prompts
from trl_entropy.estimators.statistics.student_t import student_t_quantile

UNIT = torch.eye(2, dtype=torch.float64)


def record(values, covariance, num_prompts=11):
    step = StepParts(
        torch.tensor(values, dtype=torch.float64), torch.tensor(covariance, dtype=torch.float64), num_prompts
    )
    return PooledParts.empty(2).update(step)


def test_covariance_of_a_sum_is_unbiased():
    """All 3^4 samples of four prompts with two values each."""
    outcomes = torch.tensor([[1.0, 0.0], [-2.0, 1.0], [0.5, 3.0]], dtype=torch.float64)
    p = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    samples = torch.cartesian_prod(*[torch.arange(3)] * 4)
    steps = [(sum_over_prompts(outcomes[rows]), p[rows].prod()) for rows in samples]
    mean = sum(q * step.values for step, q in steps)
    exact = sum(q * (step.values - mean).outer(step.values - mean) for step, q in steps)
    torch.testing.assert_close(sum(q * step.covariance for step, q in steps), exact)


def test_mean_and_ratio_over_steps():
    """Three unlike steps: sums first, one division, errors added in squares."""
    pooled = PooledParts.empty(2)
    values, covariances = torch.rand(3, 2, dtype=torch.float64) + 1, torch.eye(2, dtype=torch.float64) * 0.01
    for step, num_prompts in zip(values, (4, 5, 6), strict=True):
        pooled = pooled.update(StepParts(step, covariances, num_prompts))
    mean, ratio = pooled.mean(UNIT[0]), pooled.ratio(UNIT[0], UNIT[1])
    assert (mean.value, mean.stderr) == (pytest.approx(float(values[:, 0].mean())), pytest.approx(0.03**0.5 / 3))
    assert (mean.dof, mean.num_samples) == (pytest.approx(9 / (1 / 3 + 1 / 4 + 1 / 5)), 15)
    top, bottom = values.sum(0).tolist()
    assert ratio.value == pytest.approx(top / bottom)
    assert ratio.stderr == pytest.approx(math.sqrt(0.03 * (1 + (top / bottom) ** 2)) / bottom)
    assert math.isnan(PooledParts.empty(2).mean(UNIT[0]).value)


@given(st.lists(st.tuples(st.floats(0.01, 10), st.integers(2, 9)), min_size=1, max_size=4), st.floats(-2, 2))
def test_degrees_of_freedom_are_those_of_the_steps_that_vary(steps, weight):
    """Satterthwaite's formula by loops, for a linear combination of two quantities; order does not matter."""
    pooled, others, variances = PooledParts.empty(2), PooledParts.empty(2), []
    weights = torch.tensor([1.0, weight], dtype=torch.float64)
    for number, (spread, num_prompts) in enumerate(steps):
        root = spread * torch.tensor([[1.0, 0.0], [0.3 * number, 1.0]], dtype=torch.float64)
        step = StepParts(torch.zeros(2, dtype=torch.float64), root @ root.T, num_prompts)
        pooled, others = pooled.update(step), PooledParts.empty(2).update(step).merge(others)
        variances.append(float((root.T @ weights).square().sum()))
    dofs = [num_prompts - 1 for _, num_prompts in steps]
    expected = sum(variances) ** 2 / sum(v * v / dof for v, dof in zip(variances, dofs, strict=True))
    assert pooled.dof(weights) == pytest.approx(expected) == pytest.approx(others.dof(weights))
    assert min(dofs) <= pooled.dof(weights) <= sum(dofs)
    assert pooled.mean(weights).dof == pytest.approx(expected)


def test_degrees_of_freedom_where_one_step_or_none_varies():
    still, loud = (StepParts(UNIT[0], spread * UNIT, 4) for spread in (0.0, 1.0))
    pooled = PooledParts.empty(2).update(still).update(loud)
    assert pooled.dof(UNIT[0]) == 3.0
    assert PooledParts.empty(2).update(still).update(still).mean(UNIT[0]).interval() == (1.0, 1.0)


@given(st.floats(-3, 3), st.floats(-3, 3), st.floats(0.01, 1), st.floats(0.01, 1), st.floats(-0.9, 0.9))
def test_interval_is_the_set_of_ratios_not_refuted(top, bottom, top_stderr, bottom_stderr, correlation):
    cross = correlation * top_stderr * bottom_stderr
    pooled = record([top, bottom], [[top_stderr**2, cross], [cross, bottom_stderr**2]])
    low, high = pooled.ratio_interval(*UNIT, confidence=0.9)
    quantile = student_t_quantile(0.95, 10.0)

    def refuted(ratio):
        variance = top_stderr**2 - 2 * ratio * cross + ratio**2 * bottom_stderr**2
        return (top - ratio * bottom) ** 2 > quantile**2 * variance

    assume(abs(abs(bottom) - quantile * bottom_stderr) > 1e-3)
    if abs(bottom) < quantile * bottom_stderr:
        assert (low, high) == (-math.inf, math.inf)
        return
    assert low <= top / bottom <= high
    width = high - low
    assert not any(refuted(low + share * width) for share in (1e-6, 0.3, 0.5, 0.7, 1 - 1e-6))
    assert all(refuted(ratio) for ratio in (low - 1e-4 * width, high + 1e-4 * width))


def test_interval_approaches_the_delta_method():
    pooled = record([2.0, 4.0], [[1e-6, 0.0], [0.0, 4e-6]])
    expected = pooled.ratio(*UNIT).interval()
    assert pooled.ratio_interval(*UNIT) == pytest.approx(expected, rel=1e-5)


def test_unknown_errors_are_nan():
    assert jackknife_covariance(torch.ones(1, 2)).isnan().all()
    pooled = PooledParts.empty(2).update(sum_over_prompts(torch.ones(1, 2)))
    assert pooled.ratio(*UNIT).value == 1.0
    assert math.isnan(pooled.ratio(*UNIT).stderr)
    assert all(map(math.isnan, pooled.ratio_interval(*UNIT)))
