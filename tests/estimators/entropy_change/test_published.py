"""Published predictors against loops, and against the entropy of the softmax that they are derived for."""

import math
import statistics

import pytest
import torch

from trl_entropy.estimators.entropy_change.published import published_predictions
from trl_entropy.estimators.entropy_change.rivals import (
    delta_covariance,
    natural_gradient_terms,
    policy_gradient_terms,
)


def random_batch(seed=0):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.rand(*shape, dtype=torch.float64, generator=generator)  # noqa: E731
    mask = torch.arange(4) < torch.tensor([4, 2, 0, 3, 1])[:, None]
    return -draw(5, 4), 2 * draw(5, 4), draw(5) - 0.5, mask


def test_against_loops():
    logps, entropies, advantages, mask = random_batch()
    tokens = [
        (float(logps[i, k]), float(entropies[i, k]), float(advantages[i]))
        for i in range(5) for k in range(4) if mask[i, k]
    ]  # fmt: skip
    found = published_predictions(logps, entropies, advantages, mask)
    s_mean = statistics.mean(math.exp(x) * (h + x) for x, h, _ in tokens)
    largest = sorted(h for _, h, _ in tokens)[-2:]  # a fifth of ten
    for name, of_token in {
        "centred": lambda x, h, a: -a * (x + h),
        "surprisal": lambda x, h, a: -a * x,
        "discriminator": lambda x, h, a: -a * math.exp(x) * (h + x),
        "discriminator_centred": lambda x, h, a: -a * (math.exp(x) * (h + x) - s_mean),
        "steer": lambda x, h, a: -a * (1 - math.exp(x)) * math.exp(x) * (h + x),
        "steer_code": lambda x, h, a: -a * (1 - math.exp(x)) * (h + x),
        "high_entropy": lambda x, h, a: -a * (x + h) * (h in largest),
    }.items():
        assert found[name] == pytest.approx(statistics.mean(of_token(*token) for token in tokens), rel=1e-12), name
    for name, terms in (("cov_natural", natural_gradient_terms), ("cov_policy_gradient", policy_gradient_terms)):
        assert found[name] == pytest.approx(float(delta_covariance(terms(logps, advantages, mask)).value), rel=1e-9)
    means = [float(logps[i, mask[i]].mean()) for i in (0, 1, 3, 4)]
    values = [float(advantages[i]) for i in (0, 1, 3, 4)]
    products = [x * y for x, y in zip(means, values, strict=True)]
    covariance = statistics.mean(products) - statistics.mean(means) * statistics.mean(values)
    assert found["cov_sequence"] == pytest.approx(-covariance, rel=1e-9)


def test_each_is_the_entropy_change_of_the_update_that_it_is_derived_for():
    """One state, a logit for each action, each action drawn as often as it is likely, E[A] = 0."""
    counts = torch.tensor([1, 2, 5])
    p = counts.double() / counts.sum()
    advantages = torch.tensor([1.0, -2.0, 0.6], dtype=torch.float64)
    advantages = advantages - p @ advantages

    def entropy(logits):
        return torch.distributions.Categorical(logits=logits).entropy()

    natural, gradient = (torch.func.jvp(entropy, (p.log(),), (way,))[1] for way in (advantages, p * advantages))
    drawn = torch.arange(3).repeat_interleave(counts)
    ones = torch.ones(8, 1, dtype=torch.bool)
    entropies = entropy(p.log()).expand(8, 1)
    found = published_predictions(p.log()[drawn, None], entropies, advantages[drawn], ones)
    assert abs(natural) > 0.01 and abs(gradient) > 0.01
    for name in ("cov_natural", "cov_sequence", "centred", "surprisal"):
        assert found[name] == pytest.approx(float(natural), rel=1e-12), name
    for name in ("cov_policy_gradient", "discriminator", "discriminator_centred"):
        assert found[name] == pytest.approx(float(gradient), rel=1e-12), name


def test_the_exact_form_is_the_change_by_a_step_of_every_single_token():
    """In a state with a logit for each action, whatever the advantages sum to."""
    p = torch.tensor([0.1, 0.25, 0.65], dtype=torch.float64)
    drawn, advantages = torch.tensor([0, 0, 1, 2, 2]), torch.tensor([1.0, 0.5, -2.0, 0.7, -0.1], dtype=torch.float64)

    def entropy(logits):
        return torch.distributions.Categorical(logits=logits).entropy()

    changes = []
    for token, advantage in zip(drawn.tolist(), advantages, strict=True):
        direction = advantage * (torch.eye(3, dtype=torch.float64)[token] - p)
        changes.append(float(torch.func.jvp(entropy, (p.log(),), (direction,))[1]))
    entropies = entropy(p.log()).expand(5, 1)
    mean = (p * p * (p.log() + entropies[0])).sum().expand(5, 1)
    found = published_predictions(
        p.log()[drawn, None], entropies, advantages, torch.ones(5, 1, dtype=torch.bool), mean
    )
    assert min(changes) < -0.01 and max(changes) > 0.01
    assert found["discriminator_exact"] == pytest.approx(statistics.mean(changes), rel=1e-12)
    assert found["raising"] == pytest.approx(sum(one for one in changes if one > 0) / 5, rel=1e-12)
    assert found["lowering"] == pytest.approx(sum(one for one in changes if one < 0) / 5, rel=1e-12)


def test_padding_changes_nothing():
    logps, entropies, advantages, mask = random_batch(1)
    padded = [torch.nn.functional.pad(tensor, (0, 3), value=7.0) for tensor in (logps, entropies)]
    wider = torch.nn.functional.pad(mask, (0, 3))
    expected = published_predictions(logps, entropies, advantages, mask)
    assert published_predictions(*padded, advantages, wider) == pytest.approx(expected, rel=1e-12)
