"""Covariances over tokens against loops, and the claim of their authors on the softmax that they derive it for."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trl_entropy.estimators.entropy_change.rivals import (
    CovarianceTerms,
    delta_covariance,
    natural_gradient_terms,
    policy_gradient_terms,
)

BOTH = [natural_gradient_terms, policy_gradient_terms]


def random_batch(seed=0):
    generator = torch.Generator().manual_seed(seed)
    logps = -torch.rand(5, 4, dtype=torch.float64, generator=generator)
    mask = torch.arange(4) < torch.tensor([4, 2, 0, 3, 1])[:, None]
    return logps, torch.randn(5, dtype=torch.float64, generator=generator), mask


@pytest.mark.parametrize("terms", BOTH)
def test_against_loops(terms):
    logps, advantages, mask = random_batch()
    pairs = []
    for i in range(5):
        for k in range(4):
            if mask[i, k]:
                scale = math.exp(logps[i, k]) if terms is policy_gradient_terms else 1.0
                pairs.append((float(logps[i, k]), scale * float(advantages[i])))
    mean_x, mean_y = (sum(column) / len(pairs) for column in zip(*pairs, strict=True))
    covariance = sum((x - mean_x) * (y - mean_y) for x, y in pairs) / len(pairs)
    estimate = delta_covariance(terms(logps, advantages, mask)).estimate(torch.arange(5))
    assert estimate.value == pytest.approx(-covariance, rel=1e-12)
    assert estimate.stderr > 0
    per_token = delta_covariance(terms(logps, advantages[:, None].expand(5, 4), mask))
    assert float(per_token.value) == pytest.approx(-covariance, rel=1e-12)


@pytest.mark.parametrize("terms", BOTH)
def test_it_is_the_entropy_change_of_a_tabular_softmax(terms):
    """One state, a logit for every action, every action listed as often as it is likely: d entropy / d step is -Cov.

    The natural-gradient step adds A to the logits; the policy-gradient step adds pi (A - E[A]), whose covariance with
    log pi is that of pi A if E[A] = 0.
    """
    counts = torch.tensor([1, 2, 5])
    probabilities = counts.double() / counts.sum()
    advantages = torch.tensor([1.0, -2.0, 0.6], dtype=torch.float64)
    advantages = advantages - probabilities @ advantages
    direction = advantages if terms is natural_gradient_terms else probabilities * advantages

    def entropy(logits):
        return torch.distributions.Categorical(logits=logits).entropy()

    slope = torch.func.jvp(entropy, (probabilities.log(),), (direction,))[1]
    drawn = torch.arange(3).repeat_interleave(counts)
    batch = terms(probabilities.log()[drawn, None], advantages[drawn], torch.ones(8, 1, dtype=torch.bool))
    assert float(delta_covariance(batch).value) == pytest.approx(float(slope), rel=1e-12)
    assert abs(slope) > 0.01


@given(st.sampled_from(BOTH), st.integers(0, 99), st.integers(0, 5), st.integers(0, 3))
def test_micro_batches_and_padding_change_nothing(terms, seed, cut, width):
    logps, advantages, mask = random_batch(seed)
    whole = delta_covariance(terms(logps, advantages, mask))
    padded = torch.nn.functional.pad(logps.where(mask, math.nan), (0, width), value=math.nan)
    padded_mask = torch.nn.functional.pad(mask.long(), (0, width))
    parts = [terms(padded[p], advantages[p], padded_mask[p]) for p in (slice(0, cut), slice(cut, 5))]
    gathered = CovarianceTerms(*(torch.cat(vectors) for vectors in zip(*parts, strict=True)))
    split = delta_covariance(gathered)
    torch.testing.assert_close(split.value, whole.value)
    torch.testing.assert_close(split.influence, whole.influence)
