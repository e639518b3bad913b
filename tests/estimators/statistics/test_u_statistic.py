"""U and the variances of (T17) and (T18) are unbiased, by enumeration of every sample of small distributions."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_policy import TinyPolicy, multisets
from variance_oracles import independent_batches_estimate, independent_batches_variance, zeta_components

from trl_entropy.estimators.entropy_change.surrogate import surrogate_terms
from trl_entropy.estimators.statistics.u_statistic import (
    cross_gram,
    jackknife_variance,
    row_means,
    row_means_from_products,
    u_statistic,
    u_statistic_estimate,
    u_statistic_jackknife_estimate,
    u_statistic_variance,
)

PROBABILITIES = [0.5, 0.3, 0.2]
METRIC = torch.tensor([0.5, 2.0], dtype=torch.float64)


def joint_outcomes(signal):
    """Three equally shaped outcomes of a pair (X_n, Y_n) that depend on one another; `signal` shifts both means."""
    x = torch.tensor([[1.0, 0.2], [-0.7, 1.0], [0.1, -2.0]], dtype=torch.float64)
    y = torch.tensor([[0.5, -1.0], [1.5, 0.3], [-2.0, -0.4]], dtype=torch.float64)
    p = torch.tensor(PROBABILITIES, dtype=torch.float64)
    shift = signal * torch.tensor([1.0, 0.6])
    return x - p @ x + shift, y - p @ y + shift


@pytest.fixture(scope="module", params=[(0.0, 4), (0.0, 7), (1.0, 4), (1.0, 7)], ids=str)
def enumerated(request):
    """Exact mean and variance of U, and the Grams of all samples with their probabilities."""
    signal, num_prompts = request.param
    x, y = joint_outcomes(signal)
    full = cross_gram(x, y, METRIC)
    grams = [(full[rows][:, rows], p) for rows, p in multisets(PROBABILITIES, num_prompts)]
    values = [(u_statistic(gram), p) for gram, p in grams]
    mean = sum(u * p for u, p in values)
    p = torch.tensor(PROBABILITIES, dtype=torch.float64)
    return grams, mean, sum((u - mean) ** 2 * q for u, q in values), float((p @ x * METRIC) @ (p @ y)), full


def expectation(function, grams):
    return sum(p * function(gram) for gram, p in grams)


def test_unbiased_where_the_plain_product_is_not(enumerated):
    grams, mean, _, exact, full = enumerated
    assert mean == pytest.approx(exact, abs=1e-13)
    plain = expectation(lambda gram: float(gram.mean()), grams)
    same_group = float(torch.tensor(PROBABILITIES, dtype=torch.float64) @ full.diagonal())
    assert plain - exact == pytest.approx((same_group - exact) / len(grams[0][0]), rel=1e-6)
    assert abs(plain - exact) > 0.02


def test_variance_is_unbiased(enumerated):
    grams, _, variance, *_ = enumerated
    assert expectation(u_statistic_variance, grams) == pytest.approx(variance, rel=1e-10)


def test_zeta_components_are_unbiased_for_the_variances_of_the_kernel(enumerated):
    grams, *_, full = enumerated
    p = torch.tensor(PROBABILITIES, dtype=torch.float64)
    kernel = (full + full.T) / 2
    given_one = kernel @ p
    exact = [float(p @ given_one**2 - (p @ given_one) ** 2), float(p @ kernel**2 @ p - (p @ kernel @ p) ** 2)]
    estimates = [expectation(lambda gram, j=j: zeta_components(gram)[j], grams) for j in range(2)]
    assert estimates == pytest.approx(exact, rel=1e-9, abs=1e-12)


def test_jackknife_is_conservative_and_twice_too_large_without_signal(enumerated):
    grams, _, variance, exact, _ = enumerated
    ratio = expectation(lambda gram: jackknife_variance(row_means(gram)), grams) / variance
    assert 1.0 < ratio < 4.0
    if exact == pytest.approx(0.0, abs=1e-9):
        num_prompts = len(grams[0][0])
        assert ratio == pytest.approx(2 * (num_prompts - 1) / (num_prompts - 2), rel=1e-9)


@pytest.fixture
def rows():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 7, 5, dtype=torch.float64, generator=generator)


def test_formulas_of_theory_against_loops(rows):
    x, y = rows
    gram, num = cross_gram(x, y), len(x)
    products = [
        [sum(float(a) * float(b) for a, b in zip(x[n], y[m], strict=True)) for m in range(num)] for n in range(num)
    ]
    others = [[m for m in range(num) if m != n] for n in range(num)]
    r = [sum(products[n][m] + products[m][n] for m in others[n]) / (2 * (num - 1)) for n in range(num)]
    u = sum(products[n][m] for n in range(num) for m in others[n]) / (num * (num - 1))
    direct = num / (num - 1) * float(x.mean(0) @ y.mean(0)) - sum(products[n][n] for n in range(num)) / (
        num * (num - 1)
    )
    assert (u_statistic(gram), direct) == (pytest.approx(u), pytest.approx(u))
    assert row_means(gram).tolist() == pytest.approx(r)
    s2 = sum((value - u) ** 2 for value in r) / (num - 1)
    zeta_1, zeta_2 = zeta_components(gram)
    assert zeta_1 == pytest.approx(((num - 1) ** 2 * s2 / (num - 2) - zeta_2) / (num - 4))
    variance = (4 * (num - 2) * zeta_1 + 2 * zeta_2) / (num * (num - 1))
    assert u_statistic_variance(gram) == pytest.approx(variance)
    left_out = [(num * u - 2 * value) / (num - 2) for value in r]
    for n, value in enumerate(left_out):
        kept = [m for m in range(num) if m != n]
        assert value == pytest.approx(u_statistic(gram[kept][:, kept]))
    mean = sum(left_out) / num
    jackknife = (num - 1) / num * sum((value - mean) ** 2 for value in left_out)
    assert jackknife_variance(row_means(gram)) == pytest.approx(jackknife)


def test_vectors_serve_where_there_is_no_gram(rows):
    x, y = rows
    gram = cross_gram(x, y)
    means = row_means_from_products((x * y).sum(1), x @ y.mean(0), y @ x.mean(0))
    torch.testing.assert_close(means, row_means(gram))
    estimate = u_statistic_jackknife_estimate(means)
    assert (estimate.value, estimate.dof, estimate.num_samples) == (pytest.approx(u_statistic(gram)), 6.0, 7)
    assert estimate.stderr == pytest.approx(math.sqrt(jackknife_variance(means)))


def test_a_negative_variance_is_not_clamped():
    """Rows of the Gram agree while its pairs differ: the unbiased variance is below zero and the stderr unknown."""
    ring = torch.tensor([[0.0, 1, 2, 1], [1, 0, 1, 2], [2, 1, 0, 1], [1, 2, 1, 0]])
    assert u_statistic_variance(ring) < 0
    estimate = u_statistic_estimate(ring)
    assert math.isnan(estimate.stderr)
    assert estimate.value == pytest.approx(4 / 3)


@pytest.mark.parametrize("num_prompts", [1, 2, 3])
def test_too_few_groups(num_prompts):
    gram = torch.ones(num_prompts, num_prompts)
    assert math.isnan(u_statistic_estimate(gram).stderr)
    assert math.isnan(u_statistic(gram)) == (num_prompts == 1)
    assert math.isnan(jackknife_variance(row_means(gram))) == (num_prompts < 3)


@pytest.mark.parametrize("signal", [0.0, 1.0])
def test_independent_batches(signal):
    """(T18) by enumeration of both batches: value and variance unbiased, and the last term is needed."""
    x, y = joint_outcomes(signal)
    full, num_x, num_y = cross_gram(x, y, METRIC), 3, 4
    pairs = [
        (full[a][:, b], p * q)
        for (a, p), (b, q) in itertools.product(multisets(PROBABILITIES, num_x), multisets(PROBABILITIES, num_y))
    ]
    means = [(float(gram.mean()), p) for gram, p in pairs]
    mean = sum(value * p for value, p in means)
    variance = sum((value - mean) ** 2 * p for value, p in means)
    p = torch.tensor(PROBABILITIES, dtype=torch.float64)
    assert mean == pytest.approx(float((p @ x * METRIC) @ (p @ y)), abs=1e-13)
    deviations = [(v - p @ v) for v in (x * METRIC, y)]
    sx, sy = ((d.T * p) @ d for d in deviations)
    mean_x, mean_y = p @ x * METRIC, p @ y
    theory = mean_y @ sx @ mean_y / num_x + mean_x @ sy @ mean_x / num_y + (sx @ sy).trace() / (num_x * num_y)
    assert variance == pytest.approx(float(theory))
    stated = sum(p * independent_batches_variance(gram) for gram, p in pairs)
    assert stated == pytest.approx(variance, rel=1e-10)


def test_estimate_of_independent_batches(rows):
    gram = cross_gram(rows[0], rows[1][:5], METRIC.repeat(3)[:5])
    estimate = independent_batches_estimate(gram)
    assert estimate.value == pytest.approx(float((rows[0] * METRIC.repeat(3)[:5]).mean(0) @ rows[1][:5].mean(0)))
    assert estimate.stderr == pytest.approx(math.sqrt(independent_batches_variance(gram)))
    assert 4 <= estimate.dof <= 10
    only_x_varies = gram[:, :1] + torch.zeros(1, 5, dtype=torch.float64)
    assert independent_batches_estimate(only_x_varies).dof == pytest.approx(6)
    assert independent_batches_variance(only_x_varies) == pytest.approx(float(gram[:, 0].var()) / 7)


@given(st.permutations(range(6)), st.integers(0, 99))
def test_order_of_groups_does_not_matter(order, seed):
    gram = torch.randn(6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    permuted = gram[order][:, order]
    assert u_statistic(permuted) == pytest.approx(u_statistic(gram), abs=1e-12)
    assert u_statistic_variance(permuted) == pytest.approx(u_statistic_variance(gram), abs=1e-12)


def test_entropy_change_of_a_policy_from_its_own_rollouts():
    """(T17) end to end on the tiny policy: X_n and Y_n of the same groups of two, exact h and E[T] put in.

    E[U] = grad h . M E[Y] over all pairs of groups; the product of the plain means is off by the self-influence.
    """
    policy = TinyPolicy(max_length=2)
    h, mean_length = float(policy.policy_entropy(policy.theta)), policy.mean_length(policy.theta)

    def entropy_terms(theta):
        return surrogate_terms(*policy.score(theta), policy.completion_mask, h) / mean_length

    entropy_rows = torch.autograd.functional.jacobian(entropy_terms, policy.theta)
    scores = torch.autograd.functional.jacobian(lambda theta: policy.score(theta)[1].sum(1), policy.theta)
    reward = (policy.token_ids[:, 0] == 1).double() + 0.1 * policy.num_tokens
    p = policy.probabilities(policy.theta) * policy.num_prompts
    groups = [
        (i, j)
        for i, j in itertools.combinations_with_replacement(range(len(p)), 2)
        if policy.prompt_index[i] == policy.prompt_index[j]
    ]
    i, j = torch.tensor(groups).T
    probability = p[i] * p[j] * torch.where(i == j, 1, 2) / policy.num_prompts
    advantage = ((reward[i] - reward[j]) / 2)[:, None]  # reward minus the group mean
    x = (entropy_rows[i] + entropy_rows[j]) / 2
    y = -(advantage * scores[i] - advantage * scores[j]) / 2
    metric = 1 + policy.theta.abs()
    full = cross_gram(x, y, metric)
    exact = float((policy.policy_entropy_gradient(policy.theta) * metric) @ (probability @ y))
    assert float(probability.sum()) == pytest.approx(1.0)
    pairs = itertools.combinations_with_replacement(range(len(groups)), 2)
    mean = sum(
        (1 if a == b else 2) * float(probability[a] * probability[b]) * u_statistic(full[[a, b]][:, [a, b]])
        for a, b in pairs
    )
    assert mean == pytest.approx(exact, rel=1e-10)
    self_influence = float(probability @ full.diagonal()) - exact
    assert abs(self_influence) > 0.1 * abs(exact)
