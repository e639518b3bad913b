"""Importance weights against loops and exact enumeration; effective sample sizes in closed form."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_policy import TinyPolicy

from trl_entropy.estimators.statistics.importance import (
    accumulate,
    accumulate_transposed,
    effective_sample_size,
    effective_sample_size_from_sums,
    importance_weights,
    loss_weights,
)

FORMS = ["decision", "sequence"]


@pytest.fixture(scope="module")
def policy():
    return TinyPolicy()


@pytest.mark.parametrize("form", FORMS)
def test_weights_against_loops(policy, form):
    _, before = policy.score(policy.theta)
    _, after = policy.score(policy.theta + policy.update)
    weights = importance_weights(after, before, policy.completion_mask, form)
    for i, length in enumerate(policy.num_tokens.long().tolist()):
        for k in range(length):
            tokens = range(k) if form == "decision" else range(length)
            expected = math.prod(math.exp(after[i, j] - before[i, j]) for j in tokens)
            assert float(weights[i, k]) == pytest.approx(expected, rel=1e-13)
    assert weights.std() > 0.05


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("sampler_step", [0.0, 0.7])
def test_reweighted_sums_have_the_expectation_under_the_new_policy(policy, form, sampler_step):
    """(T6) by exact enumeration, drawn from the policy itself or from another sampler."""
    moved, sampler = policy.theta + policy.update, policy.theta - sampler_step * policy.update
    entropy, after = policy.score(moved)
    sampling_logps = policy.score(sampler)[1]
    weights = importance_weights(after, sampling_logps, policy.completion_mask, form)
    p = policy.probabilities(sampler)
    numerator = p @ (weights * entropy * policy.completion_mask).sum(1)
    denominator = p @ (weights * policy.completion_mask).sum(1)
    exact_length = policy.mean_length(moved)
    assert float(denominator) == pytest.approx(float(exact_length), rel=1e-12)
    assert float(numerator) == pytest.approx(float(policy.policy_entropy(moved) * exact_length), rel=1e-12)
    assert float(p @ policy.num_tokens) != pytest.approx(float(exact_length), rel=1e-2)  # the weights are needed


def test_masked_log_probabilities_may_be_anything_also_in_the_gradient():
    mask = torch.tensor([[True, True, False]])
    logps = torch.tensor([[-1.0, -2.0, math.nan]], dtype=torch.float64, requires_grad=True)
    weights = importance_weights(logps, torch.tensor([[-1.5, -2.0, math.inf]]).double(), mask)
    assert weights.tolist() == [[1.0, pytest.approx(math.exp(0.5)), pytest.approx(math.exp(0.5))]]
    weights[:, :2].sum().backward()
    assert logps.grad.tolist() == [[pytest.approx(math.exp(0.5)), 0.0, 0.0]]


@pytest.mark.parametrize("form", FORMS)
@given(st.integers(1, 3), st.integers(0, 6), st.integers(0, 99))
def test_transposed_is_the_transpose(form, batch, length, seed):
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(2, batch, length, dtype=torch.float64, generator=generator)
    left, right = (accumulate(x, form) * y).sum(), (x * accumulate_transposed(y, form)).sum()
    assert float(left) == pytest.approx(float(right), abs=1e-12)


def test_effective_sample_size_closed_forms():
    assert float(effective_sample_size(torch.full((7,), 0.3))) == pytest.approx(7, rel=1e-6)
    assert float(effective_sample_size(torch.tensor([2.0, 0.0, 0.0]))) == 1.0
    assert float(effective_sample_size(torch.tensor([1.0, 3.0]))) == pytest.approx(16 / 10)
    assert math.isnan(effective_sample_size(torch.zeros(3)))


@given(st.lists(st.floats(0.01, 100), min_size=2, max_size=20), st.floats(0.01, 100), st.data())
def test_effective_sample_size_ignores_scale_order_and_split(weights, scale, data):
    cut = data.draw(st.integers(0, len(weights)))
    w = torch.tensor(weights, dtype=torch.float64)
    size = float(effective_sample_size(w))
    assert 1 - 1e-9 <= size <= len(weights) * (1 + 1e-9)
    assert float(effective_sample_size(scale * w.flip(0))) == pytest.approx(size)
    sums = [part.sum() for part in (w[:cut], w[cut:])], [part.square().sum() for part in (w[:cut], w[cut:])]
    assert float(effective_sample_size_from_sums(*(sum(s) for s in sums))) == pytest.approx(size)


def test_loss_weights_leave_out_zero_advantages():
    weights = loss_weights(torch.tensor([4, 8, 8, 5]), torch.tensor([0.5, -0.1, 0.0, 1.0]), num_generations=2)
    assert weights.tolist() == [1 / 8, 1 / 16, 0.0, 1 / 10]
    constant = loss_weights(torch.full((6,), 256), torch.tensor([1.0, 0, 0, -1, 2, 0]), num_generations=3)
    assert float(effective_sample_size(constant)) == 3.0
