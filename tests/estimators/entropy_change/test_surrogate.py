"""Gradients of the surrogates are unbiased for grad h, by enumeration of every outcome."""

import math

import pytest
import torch
from entropy_oracles import ratio_surrogate
from hypothesis import given
from hypothesis import strategies as st
from tiny_policy import TinyPolicy

from trl_entropy.estimators.entropy_change.surrogate import (
    entropy_surrogate,
    score_coefficients,
    surrogate_terms,
)
from trl_entropy.estimators.statistics.importance import importance_weights

FORMS = ["decision", "sequence"]
POLICY = TinyPolicy()


def expected_gradient(form, theta, weights=None, baseline=None):
    """E over all outcomes drawn at POLICY.theta of the gradient of the surrogate, with exact h and E[T] at theta."""
    h, mean_length = float(POLICY.policy_entropy(theta)), float(POLICY.mean_length(theta))
    p = POLICY.probabilities(POLICY.theta)

    def mean_surrogate(moved):
        terms = surrogate_terms(
            *POLICY.score(moved), POLICY.completion_mask, h, weights=weights, form=form, baseline=baseline
        )
        return p @ terms / mean_length

    return torch.autograd.functional.jacobian(mean_surrogate, theta)


def prefix_baseline():
    """A function of q and o_<k only: features of the prefix, no sight of o_k."""
    return POLICY.features.sin().sum(-1)


def assert_gradient(got, theta):
    torch.testing.assert_close(got, POLICY.policy_entropy_gradient(theta), rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("baseline", [None, prefix_baseline()])
def test_unbiased_with_exact_entropy_and_length(form, baseline):
    """(T8) for both forms of a_ik, with and without a baseline."""
    assert_gradient(expected_gradient(form, POLICY.theta, baseline=baseline), POLICY.theta)


def test_a_baseline_that_sees_the_token_is_biased():
    seen = POLICY.token_ids.double()
    with pytest.raises(AssertionError):
        assert_gradient(expected_gradient("decision", POLICY.theta, baseline=seen), POLICY.theta)


@pytest.mark.parametrize("form", FORMS)
def test_away_from_the_sampler_the_weights_are_needed(form):
    """(T10): grad h at theta + dtheta from completions drawn at theta."""
    moved = POLICY.theta + POLICY.update
    logps, sampling_logps = POLICY.score(moved)[1], POLICY.score(POLICY.theta)[1]
    weights = importance_weights(logps, sampling_logps, POLICY.completion_mask, form)
    assert_gradient(expected_gradient(form, moved, weights), moved)
    with pytest.raises(AssertionError):
        assert_gradient(expected_gradient(form, moved), moved)


@pytest.mark.parametrize("form", FORMS)
def test_baseline_away_from_the_sampler_carries_the_weight_up_to_its_token(form):
    moved = POLICY.theta + POLICY.update
    logps, sampling_logps = POLICY.score(moved)[1], POLICY.score(POLICY.theta)[1]
    weights = importance_weights(logps, sampling_logps, POLICY.completion_mask, form)
    up_to_token = (logps - sampling_logps).cumsum(1).exp()
    assert_gradient(expected_gradient(form, moved, weights, up_to_token * prefix_baseline()), moved)
    with pytest.raises(AssertionError):
        assert_gradient(expected_gradient(form, moved, weights, prefix_baseline()), moved)


@pytest.mark.parametrize("form", FORMS)
def test_coefficients_against_loops(form):
    entropy, weights = torch.rand(2, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    baseline, mask = entropy.sin(), torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0]])
    got = score_coefficients(entropy, mask, 0.4, weights=weights, form=form, baseline=baseline)
    for i, length in enumerate((4, 2, 0)):
        for k in range(4):
            tokens = range(k + 1, length) if form == "decision" else range(length)
            expected = sum(float(weights[i, j]) * (float(entropy[i, j]) - 0.4) for j in tokens)
            expected = expected - float(baseline[i, k]) if k < length else 0.0
            assert float(got[i, k]) == pytest.approx(expected, abs=1e-14)


@pytest.mark.parametrize("form", FORMS)
def test_both_surrogates_have_the_same_gradient_anywhere(form):
    """The detached coefficients are the derivative of the differentiable weights."""
    moved, sampling_logps = POLICY.theta + POLICY.update, POLICY.score(POLICY.theta)[1]
    weights = importance_weights(POLICY.score(moved)[1], sampling_logps, POLICY.completion_mask, form)

    def detached(theta):
        return entropy_surrogate(*POLICY.score(theta), POLICY.completion_mask, 0.6, 7, weights=weights, form=form)

    def differentiable(theta):
        return ratio_surrogate(*POLICY.score(theta), sampling_logps, POLICY.completion_mask, 0.6, 7, form)

    gradients = [torch.autograd.functional.jacobian(f, moved) for f in (detached, differentiable)]
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-11, atol=1e-13)


@given(st.sampled_from(FORMS), st.integers(0, 30), st.integers(0, 3))
def test_micro_batches_and_padding_change_neither_surrogate(form, cut, width):
    def gradient(function, slices, width, filler):
        theta = POLICY.theta.clone().requires_grad_()
        total = 0.0
        for part in slices:
            mask = torch.nn.functional.pad(POLICY.completion_mask[part], (0, width))
            scored = [torch.nn.functional.pad(v[part], (0, width), value=filler) for v in POLICY.score(theta)]
            total = total + function(*scored, mask)
        return torch.autograd.grad(total, theta)[0]

    def differentiable(entropy, logps, mask):
        return ratio_surrogate(entropy, logps, logps, mask, 0.6, 50.0, form)

    def detached(entropy, logps, mask):
        return entropy_surrogate(entropy, logps, mask, 0.6, 50.0, form=form)

    for function in (detached, differentiable):
        whole = gradient(function, [slice(None)], 0, 0.0)
        split = gradient(function, [slice(0, cut), slice(cut, None)], width, math.nan)
        torch.testing.assert_close(split, whole, rtol=1e-10, atol=1e-12)
        assert whole.abs().max() > 1e-3


def test_coefficients_carry_no_gradient_and_sampling_logps_need_no_detaching():
    theta = POLICY.theta.clone().requires_grad_()
    entropy, logps = POLICY.score(theta)
    weights = importance_weights(logps, logps.detach(), POLICY.completion_mask)
    assert not score_coefficients(entropy, POLICY.completion_mask, 0.6, weights=weights).requires_grad
    surrogates = [
        ratio_surrogate(entropy, logps, sampling, POLICY.completion_mask, 0.6, 7)
        for sampling in (logps, logps.detach())
    ]
    forgetful, careful = (torch.autograd.grad(s, theta, retain_graph=True)[0] for s in surrogates)
    torch.testing.assert_close(forgetful, careful)


@pytest.mark.parametrize("form", FORMS)
def test_no_gradient_flows_through_the_weights(form):
    theta = (POLICY.theta + POLICY.update).requires_grad_()
    entropy, logps = POLICY.score(theta)
    weights = importance_weights(logps, POLICY.score(POLICY.theta)[1], POLICY.completion_mask, form)

    def gradient(weights):
        terms = surrogate_terms(entropy, logps, POLICY.completion_mask, 0.6, weights=weights, form=form)
        return torch.autograd.grad(terms.sum(), theta, retain_graph=True)[0]

    assert weights.requires_grad and torch.equal(gradient(weights), gradient(weights.detach()))
