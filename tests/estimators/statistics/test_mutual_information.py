"""Bounds on I(prompt; completion) (T23), by enumeration, by loops, and as a policy becomes a template."""

import itertools
import math

import pytest
import torch
from tiny_policy import NUM_FEATURES, VOCAB, TinyPolicy

from trl_entropy.estimators.statistics.calibration import coverage
from trl_entropy.estimators.statistics.mutual_information import mutual_information

POLICY = TinyPolicy(max_length=2, num_prompts=3)


def table_of(policy=POLICY, template=0.0, theta=None):
    """
    log pi(o | x) of every outcome, (outcomes, prompts); `template` of 1 takes what the prompts say out of the
    features, at the same scale, so that the entropy stays.
    """
    shape = (policy.num_prompts, -1, *policy.features.shape[1:])
    features, theta = policy.features.view(shape), policy.theta if theta is None else theta
    mixed = (1 - template) * features + template * features.mean(0, keepdim=True)
    mixed = mixed * (features.std() / mixed.std())
    log_probs = (mixed.flatten(0, 1) @ theta.view(NUM_FEATURES, VOCAB)).log_softmax(-1)
    logps = log_probs.gather(-1, policy.token_ids[..., None]).squeeze(-1).where(policy.completion_mask, 0.0)
    return logps.sum(1).view(policy.num_prompts, -1).T


def information(table, prompts):
    """I of prompt and completion where the prompts are equally likely, from the joint probabilities alone."""
    joint = table[:, prompts].exp() / len(prompts)
    return float((joint * (joint / (joint.sum(0) * joint.sum(1, keepdim=True))).log()).sum())


def expected(table, size):
    """E[lower], E[upper] and E[I of the drawn prompts] over all draws of `size` prompts with a completion each."""
    found, outcomes = torch.zeros(3, dtype=torch.float64), range(len(table))
    for prompts in itertools.product(range(table.shape[1]), repeat=size):
        for drawn in itertools.product(outcomes, repeat=size):
            probability = math.exp(sum(float(table[o, x]) for o, x in zip(drawn, prompts, strict=True)))
            bounds = mutual_information(table[list(drawn)][:, list(prompts)], torch.arange(size))
            row = bounds.lower.value, bounds.upper.value, information(table, list(prompts))
            found += probability / table.shape[1] ** size * torch.tensor(row, dtype=torch.float64)
    return found.tolist()


def test_the_truth_lies_between_the_expected_bounds():
    """Two prompts out of three: the lower bound is the information about which of the drawn ones it was, exactly."""
    table = table_of()
    truth, (lower, upper, of_drawn) = information(table, range(3)), expected(table, 2)
    assert lower == pytest.approx(of_drawn, rel=1e-12)
    assert 0.4 * truth < lower < truth < upper
    assert information(table, range(3)) <= math.log(3)


def by_loops(logps, own, log_weights, out=None):
    prompts = [j for j in range(logps.shape[1]) if j != out]
    totals, weight_sum = [0.0] * 4, 0.0
    for i, mine in enumerate(own.tolist()):
        if mine == out:
            continue
        all_of_them = [math.exp(float(logps[i, j])) for j in prompts]
        others = [math.exp(float(logps[i, j])) for j in prompts if j != mine]
        score, weight = float(logps[i, mine]), math.exp(float(log_weights[i]))
        row = (
            score - math.log(sum(all_of_them) / len(all_of_them)),
            score - math.log(sum(others) / len(others)),
            -score,
            float(math.exp(score) > max(others)),
        )
        totals = [total + weight * value for total, value in zip(totals, row, strict=True)]
        weight_sum += weight
    return [total / weight_sum for total in totals]


@pytest.mark.parametrize("weighted", [False, True], ids=["drawn by the policy", "by another"])
def test_numbers_and_errors_are_those_of_loops(weighted):
    generator = torch.Generator().manual_seed(0)
    own = torch.tensor([2, 0, 0, 1, 3, 3, 2, 1])
    logps = -3 * torch.rand(len(own), 4, dtype=torch.float64, generator=generator)
    log_weights = 0.5 * torch.randn(len(own), dtype=torch.float64, generator=generator) * weighted
    found = mutual_information(logps, own, log_weights if weighted else None)
    whole = by_loops(logps, own, log_weights)
    without = torch.tensor([by_loops(logps, own, log_weights, out) for out in range(4)], dtype=torch.float64)
    stderr = (3 / 4 * (without - without.mean(0)).square().sum(0)).sqrt().tolist()
    for estimate, value, error in zip(found, whole, stderr, strict=True):
        assert (estimate.value, estimate.stderr) == (pytest.approx(value), pytest.approx(error))
        assert (estimate.dof, estimate.num_samples) == (3, 8)


def test_the_lower_bound_ends_at_the_logarithm_of_the_prompts():
    own = torch.arange(4)
    found = mutual_information(torch.full((4, 4), -2000.0).scatter(1, own[:, None], -1.0), own)
    assert found.lower.value == pytest.approx(math.log(4)) and found.upper.value == pytest.approx(1999)
    assert found.identified.value == 1


def test_a_template_has_no_information_and_its_entropy_all_the_same():
    """A policy of which the prompts' say is taken away: H(O | X) stays, I falls to 0, and both bounds follow it."""
    found = []
    policy = TinyPolicy(max_length=3, num_prompts=8, seed=5)
    for template in (0.0, 0.8, 1.0):
        table = table_of(policy, template, 2 * policy.theta)
        generator, own = torch.Generator().manual_seed(1), torch.arange(8).repeat_interleave(64)
        drawn = torch.multinomial(table.T.exp(), 64, replacement=True, generator=generator).flatten()
        entropy = -float((table.exp() * table).sum(0).mean())
        found.append((information(table, range(8)), entropy, mutual_information(table[drawn], own)))
    truth, entropies, bounds = zip(*found, strict=True)
    assert truth[0] > 2 * truth[1] > 0.1 and abs(truth[2]) < 1e-12
    assert all(abs(entropy / entropies[0] - 1) < 0.25 for entropy in entropies)
    for exact, bound in zip(truth, bounds, strict=True):
        assert bound.lower.value == pytest.approx(exact, abs=3 * bound.lower.stderr + 1e-12)
        assert bound.upper.value >= bound.lower.value - 1e-12
    assert bounds[2].upper.value == pytest.approx(0, abs=1e-12)


@pytest.mark.slow
def test_intervals_cover_over_redraws():
    """16 prompts out of 64, 8 completions each; the truth of the lower bound is its expectation over draws."""
    policy, generator = TinyPolicy(max_length=3, num_prompts=64, seed=5), torch.Generator().manual_seed(0)
    table, own, found = table_of(policy), torch.arange(16).repeat_interleave(8), []
    for _ in range(300):
        prompts = torch.randint(64, (16,), generator=generator)
        drawn = torch.multinomial(table[:, prompts].T.exp(), 8, replacement=True, generator=generator).flatten()
        found.append(mutual_information(table[drawn][:, prompts], own).lower)
    summary = coverage(found, sum(one.value for one in found) / len(found))
    assert 0.9 <= summary.covered <= 0.99
