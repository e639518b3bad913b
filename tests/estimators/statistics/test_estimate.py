"""Standard errors against loops, simulation and reweighting."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trl_entropy.estimators.statistics.estimate import (
    Estimate,
    Linearization,
    cluster_sums,
    delta_method,
)
from trl_entropy.estimators.statistics.student_t import student_t_quantile


def test_interval_is_the_value_and_a_t_margin_either_side():
    low, high = Estimate(3.0, 0.5, 7.0, 16).interval(0.9)
    assert (low + high) / 2 == pytest.approx(3.0)
    assert high - low == pytest.approx(2 * 0.5 * student_t_quantile(0.95, 7.0))
    assert all(math.isnan(edge) for edge in Estimate(3.0, math.nan, 0.0, 1).interval())


def test_cluster_sums_over_scattered_indices():
    values, index = torch.tensor([1.0, 2.0, 4.0, 8.0]), torch.tensor([7, 3, 7, 5])
    assert cluster_sums(values, index).tolist() == [2.0, 8.0, 5.0]


def test_jackknife_over_prompts_against_loops():
    values = torch.tensor([0.3, 1.0, -2.0, 0.7, 5.0, 1.1], dtype=torch.float64)
    index = [0, 0, 1, 2, 2, 2]
    mean = sum(values.tolist()) / 6
    kept = [[float(values[i]) for i in range(6) if index[i] != p] for p in range(3)]
    left_out = [sum(some) / len(some) for some in kept]
    total = sum((value - sum(left_out) / 3) ** 2 for value in left_out)
    linear = delta_method(lambda m: m[0], values[:, None])
    for factor, found in ((1.0, linear), (3.0, 2.0 * linear + linear), (0.5, linear - 0.5 * linear)):
        estimate = found.estimate(torch.tensor(index))
        assert estimate.value == pytest.approx(factor * mean)
        assert estimate.stderr == pytest.approx(factor * math.sqrt(2 / 3 * total))
        assert (estimate.dof, estimate.num_samples) == (2, 6)


def test_error_of_a_ratio_is_not_too_small_where_one_prompt_is_long():
    """One prompt has most of the denominator: without it the ratio is another, which its influence does not show."""
    statistics = torch.tensor([[90.0, 100.0], [1.0, 10.0], [2.0, 10.0], [3.0, 10.0]], dtype=torch.float64)
    ratio = delta_method(lambda m: m[0] / m[1], statistics)
    left_out = [
        float(rows[:, 0].sum() / rows[:, 1].sum())
        for p in range(4)
        for rows in [statistics[[q for q in range(4) if q != p]]]
    ]
    expected = math.sqrt(3 / 4 * sum((value - sum(left_out) / 4) ** 2 for value in left_out))
    assert ratio.estimate(torch.arange(4)).stderr == pytest.approx(expected)
    assert expected > 2 * float((4 / 3 * ratio.influence.square().sum()).sqrt()) / 4


def test_clusters_of_one_give_the_textbook_error_of_a_mean():
    values = torch.randn(40, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    estimate = delta_method(lambda m: m[0], values).estimate(torch.arange(40))
    assert estimate.stderr == pytest.approx(float(values.std()) / math.sqrt(40))


def test_one_prompt_has_no_standard_error():
    estimate = delta_method(lambda m: m[0], torch.ones(4, 1)).estimate(torch.zeros(4, dtype=torch.long))
    assert estimate.value == 1.0
    assert math.isnan(estimate.stderr)


def test_influence_is_the_derivative_with_respect_to_a_completions_weight():
    statistics = torch.rand(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def function(m):
        return m[0] * m[1].exp() / m[2]

    linearization, step = delta_method(function, statistics), 1e-6
    for i in range(6):
        weights = torch.full((6,), 1.0 / 6, dtype=torch.float64)
        weights[i] += step
        moved = function(weights / weights.sum() @ statistics)
        assert float((moved - linearization.value) / step) == pytest.approx(
            float(linearization.influence[i]), rel=1e-4
        )
    assert float(linearization.influence.sum()) == pytest.approx(0.0, abs=1e-12)


def test_arithmetic_is_paired():
    data = torch.randn(50, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    first, second = (delta_method(lambda m, j=j: m[j], data) for j in range(2))
    index = torch.arange(50)
    difference = (2.0 * first - second).estimate(index)
    expected = delta_method(lambda m: m[0], 2 * data[:, :1] - data[:, 1:]).estimate(index)
    assert difference.value == pytest.approx(expected.value)
    assert difference.stderr == pytest.approx(expected.stderr)
    assert isinstance(first + second, Linearization)
    assert (first + first).estimate(index).stderr == pytest.approx(2 * first.estimate(index).stderr)


@pytest.mark.slow
def test_intervals_of_clustered_means_cover():
    """Members of a cluster share an effect: clustered intervals cover 95 %, those that ignore clusters far less."""
    generator, num_prompts, num_generations, reps = torch.Generator().manual_seed(3), 12, 4, 1500
    index = torch.arange(num_prompts).repeat_interleave(num_generations)
    covered = torch.zeros(2)
    for _ in range(reps):
        shared = torch.randn(num_prompts, dtype=torch.float64, generator=generator)[index]
        values = shared + torch.randn(len(index), dtype=torch.float64, generator=generator)
        linearization = delta_method(lambda m: m[0], values[:, None])
        for j, clusters in enumerate((index, torch.arange(len(index)))):
            low, high = linearization.estimate(clusters).interval()
            covered[j] += low <= 0 <= high
    binomial_error = math.sqrt(0.95 * 0.05 / reps)
    assert abs(covered[0] / reps - 0.95) < 3.5 * binomial_error
    assert covered[1] / reps < 0.95 - 10 * binomial_error


@given(st.permutations(range(8)))
def test_order_of_completions_does_not_matter(order):
    order = torch.tensor(order)
    data, index = torch.arange(16.0).view(8, 2).sin(), torch.arange(8) // 2
    whole, permuted = (delta_method(lambda m: m[0] / m[1], d) for d in (data, data[order]))
    assert permuted.estimate(index[order]).stderr == pytest.approx(whole.estimate(index).stderr, rel=1e-12)
