"""Clip-Cov and KL-Cov by their definitions, token by token, and whatever the batch is cut into."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from published_token_control import PublishedLoss

from trl_entropy.estimators.control.token_control import (
    centred_covariances,
    clip_cov_tokens,
    exchange_tokens,
    kl_cov_penalty,
    kl_cov_tokens,
    num_chosen,
    random_positive_tokens,
    random_tokens,
    ratio_clipped,
    token_covariances,
)


def batch(seed, rows=6, width=5):
    generator = torch.Generator().manual_seed(seed)
    logps, order = torch.rand(2, rows, width, generator=generator, dtype=torch.float64)
    advantages = torch.randn(rows, generator=generator, dtype=torch.float64)
    mask = torch.arange(width) < torch.randint(1, width + 1, (rows, 1), generator=generator)
    return -5 * logps, advantages, mask, order


@given(st.integers(0, 1000))
def test_covariances_equal_loops(seed):
    logps, advantages, mask, _ = batch(seed)
    places = [(i, k) for i, k in itertools.product(range(6), range(5)) if mask[i, k]]
    mean_logp = sum(float(logps[place]) for place in places) / len(places)
    mean_advantage = sum(float(advantages[i]) for i, _ in places) / len(places)
    found = token_covariances(logps, advantages, mask)
    for i, k in itertools.product(range(6), range(5)):
        expected = (float(logps[i, k]) - mean_logp) * (float(advantages[i]) - mean_advantage)
        assert math.isnan(found[i, k]) if not mask[i, k] else float(found[i, k]) == pytest.approx(expected, abs=1e-12)
    per_token = advantages[:, None].expand(mask.shape)
    assert torch.equal(token_covariances(logps, per_token, mask).nan_to_num(), found.nan_to_num())


@given(st.integers(0, 1000))
def test_centred_covariances_are_of_the_tokens_own_distribution(seed):
    """A (S - E[S]) with the mean over all tokens that could have stood there, enumerated."""
    _, advantages, mask, _ = batch(seed)
    logits = torch.randn(6, 5, 7, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    distribution = logits.log_softmax(-1)
    entropy = -(distribution.exp() * distribution).sum(-1)
    for token in range(7):
        found = centred_covariances(distribution[..., token], entropy, advantages, mask)
        for i, k in itertools.product(range(6), range(5)):
            mean = sum(math.exp(logp) * logp for logp in distribution[i, k].tolist())
            expected = float(advantages[i]) * (float(distribution[i, k, token]) - mean)
            assert math.isnan(found[i, k]) if not mask[i, k] else float(found[i, k]) == pytest.approx(expected)
    by_token = advantages[:, None].expand(mask.shape)
    assert torch.equal(
        centred_covariances(distribution[..., 6], entropy, by_token, mask).nan_to_num(), found.nan_to_num()
    )


@given(st.integers(0, 1000), st.integers(1, 8))
def test_clip_cov_takes_random_tokens_between_the_bounds(seed, count):
    logps, advantages, mask, order = batch(seed)
    covariances = token_covariances(logps, advantages, mask)
    chosen = clip_cov_tokens(covariances, (-0.1, 0.8), count, order)
    places = [place for place in itertools.product(range(6), range(5)) if -0.1 < covariances[place] < 0.8]
    first = sorted(places, key=lambda place: float(order[place]))[:count]
    assert {tuple(place) for place in chosen.nonzero().tolist()} == set(first)


def test_clip_cov_by_quantiles():
    logps, advantages, mask, order = batch(1)
    covariances = token_covariances(logps, advantages, mask)
    known = covariances[mask].sort().values
    chosen = clip_cov_tokens(covariances, (0.5, 1.0), 100, order, quantiles=True)
    assert covariances[chosen].min() > known.quantile(0.5) and covariances[chosen].max() < known[-1]
    assert int(chosen.sum()) == sum(known.quantile(0.5) < value < known[-1] for value in known)


@given(st.integers(0, 1000), st.integers(1, 8))
def test_kl_cov_takes_the_largest(seed, count):
    logps, advantages, mask, _ = batch(seed)
    covariances = token_covariances(logps, advantages, mask)
    chosen = kl_cov_tokens(covariances, count)
    largest = covariances[mask].sort(descending=True).values[:count]
    assert covariances[chosen].sort(descending=True).values.tolist() == largest.tolist()


@given(st.integers(0, 1000), st.integers(1, 12))
def test_exchange_takes_what_loses_most_entropy_for_what_it_earns(seed, count):
    """Sorted in Python; what earns nothing before what earns, and nothing that raises the entropy."""
    generator = torch.Generator().manual_seed(seed)
    entropy, reward = torch.randn(2, 6, 5, generator=generator, dtype=torch.float64)
    entropy[0], reward[1] = 0.0, 0.0
    _, _, mask, _ = batch(seed)

    def key(place):
        lost, earned = -float(entropy[place]), float(reward[place])
        return (0, -lost) if earned <= 0 else (1, -lost / earned)

    places = [place for place in itertools.product(range(6), range(5)) if mask[place] and entropy[place] < 0]
    expected = set(sorted(places, key=key)[:count])
    chosen = exchange_tokens(entropy, reward, mask, count)
    assert {tuple(place) for place in chosen.nonzero().tolist()} == expected
    scaled = exchange_tokens(1e-9 * entropy, 1e-9 * reward, mask, count)  # the learning rate is in neither
    assert torch.equal(scaled, chosen)


@given(st.integers(0, 1000))
def test_random_tokens_are_as_many_and_under_the_mask(seed):
    _, _, mask, order = batch(seed)
    chosen = random_tokens(mask, 4, order)
    assert int(chosen.sum()) == min(4, int(mask.sum())) and not (chosen & ~mask).any()


@given(st.integers(0, 1000), st.integers(1, 8))
def test_random_positive_tokens_are_random_ones_of_positive_advantage(seed, count):
    _, advantages, mask, order = batch(seed)
    chosen = random_positive_tokens(mask, advantages, count, order)
    places = [(i, k) for i, k in itertools.product(range(6), range(5)) if mask[i, k] and advantages[i] > 0]
    first = sorted(places, key=lambda place: float(order[place]))[:count]
    assert {tuple(place) for place in chosen.nonzero().tolist()} == set(first)
    per_token = advantages[:, None].expand(mask.shape)
    assert torch.equal(random_positive_tokens(mask, per_token, count, order), chosen)


@given(st.integers(0, 1000), st.sampled_from([0.001, 0.1, 0.5]))
def test_one_micro_batch_as_published(seed, fraction):
    """Which tokens, and how many, in float64, off policy: those that the ratio clips are no candidates of Clip-Cov."""
    logps, advantages, mask, order = batch(seed)
    old = logps + 0.3 * torch.randn(logps.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    published = PublishedLoss(logps.tolist(), old.tolist(), advantages.tolist(), mask.tolist())
    covariances, bounds = token_covariances(logps, advantages, mask), (0.05, 2.0)
    clipped = ratio_clipped(logps, old, advantages, (0.2, 0.2))
    assert all(bool(clipped[place]) == published.clipped(place, 0.2) for place in published.places)
    candidates = clip_cov_tokens(covariances.where(~clipped, math.nan), bounds, mask.numel(), order)
    assert {tuple(place) for place in candidates.nonzero().tolist()} == published.clip_cov_candidates(bounds, 0.2)
    count = num_chosen(mask, fraction)
    chosen = clip_cov_tokens(covariances.where(~clipped, math.nan), bounds, count, order)
    assert not (chosen & ~candidates).any() and int(chosen.sum()) == published.clip_cov_count(fraction, bounds, 0.2)
    largest = kl_cov_tokens(covariances, count)
    assert {tuple(place) for place in largest.nonzero().tolist()} == published.kl_cov_tokens(100 * fraction)


def test_a_clipped_token_is_one_without_a_gradient():
    """min(ratio A, clip(ratio) A) with two bounds, by automatic differentiation; ratios on either side of both."""
    ratio = torch.linspace(0.52, 1.72, 25, dtype=torch.float64).expand(2, 25)
    advantages, old = torch.tensor([1.0, -1.0], dtype=torch.float64), torch.zeros(2, 25, dtype=torch.float64)
    logps = ratio.log().requires_grad_()
    weights = advantages[:, None]
    clipped = torch.minimum(logps.exp() * weights, logps.exp().clamp(1 - 0.1, 1 + 0.4) * weights)
    (grad,) = torch.autograd.grad(clipped.sum(), logps)
    found = ratio_clipped(logps.detach(), old, advantages, (0.1, 0.4))
    assert torch.equal(found, grad == 0) and found.sum(1).tolist() == [7, 8]


def test_padding_and_order_of_rows_change_nothing():
    """As when other processes or micro-batches have longer completions: columns more, rows elsewhere."""
    logps, advantages, mask, order = batch(2)
    wide = [torch.nn.functional.pad(x, (0, 3)) for x in (logps, mask, order)]
    expected = clip_cov_tokens(token_covariances(logps, advantages, mask), (-1.0, 0.5), 3, order)
    found = clip_cov_tokens(token_covariances(wide[0], advantages, wide[1]), (-1.0, 0.5), 3, wide[2])
    assert torch.equal(found[:, :5], expected) and not found[:, 5:].any()
    turned = clip_cov_tokens(
        token_covariances(logps.flip(0), advantages.flip(0), mask.flip(0)), (-1.0, 0.5), 3, order.flip(0)
    )
    assert torch.equal(turned.flip(0), expected)


def test_how_many():
    mask = torch.ones(3, 100, dtype=torch.bool)
    assert [num_chosen(mask, fraction) for fraction in (0.0, 1e-4, 0.1, 1.0)] == [0, 1, 30, 300]


def test_penalty_and_its_gradient():
    """coefficient sign(S - S_old) / normalizer on the chosen tokens; 0 where the policy is the one that sampled."""
    logps = torch.tensor([[-1.0, -2.0], [-0.5, -3.0]], dtype=torch.float64, requires_grad=True)
    old = torch.tensor([[-1.5, -1.0], [-0.5, -2.0]], dtype=torch.float64)
    chosen = torch.tensor([[True, True], [True, False]])
    value = kl_cov_penalty(logps, old, chosen, 2.0, 10.0)
    assert float(value) == pytest.approx(2 * (0.5 + 1.0) / 10)
    (gradient,) = torch.autograd.grad(value, logps)
    assert gradient.tolist() == [[0.2, -0.2], [0.0, 0.0]]
