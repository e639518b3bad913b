"""The change of any expectation by a step (T21), by enumeration of a tiny policy and over redraws."""

import itertools

import pytest
import torch
from tiny_policy import END, TinyPolicy

from trl_entropy.estimators.entropy_change.delta_entropy import delta_linear, delta_measured, policy_entropy
from trl_entropy.estimators.entropy_change.expectation import (
    baseline,
    expectation_terms,
    log_weight_sums,
    slope_coefficients,
)
from trl_entropy.estimators.entropy_change.step_change import point_terms, step_changes
from trl_entropy.estimators.statistics.calibration import coverage

POLICY = TinyPolicy(max_length=2)
MASK = POLICY.completion_mask
# A terminal number, and one that is a sum over tokens.
REWARD = (POLICY.token_ids[:, 0] == 1).double() - 0.3 * (POLICY.token_ids[:, 1] == END) + 0.1 * POLICY.prompt_index
LENGTH = MASK.sum(1).double()
QUANTITIES = {"reward": REWARD, "length": LENGTH}


def policy_at(share, policy=POLICY):
    return policy.theta + share * policy.update


def expectation(values, share, policy=POLICY):
    return policy.probabilities(policy_at(share, policy)) @ values


def slope(values, share):
    at = torch.tensor(float(share), dtype=torch.float64)
    return float(torch.func.jvp(lambda s: expectation(values, s), (at,), (torch.ones_like(at),))[1])


def log_weights(share, drawn_at, policy=POLICY):
    """log w of every outcome and its derivative along the update."""
    theta, sampling = policy_at(share, policy), policy.score(policy_at(drawn_at, policy))[1]
    logps, tangent = torch.func.jvp(lambda t: policy.score(t)[1], (theta,), (policy.update,))
    return log_weight_sums((logps, tangent), sampling, policy.completion_mask)


def samples(grouped, drawn_at):
    """
    All samples of two prompt groups of two completions each, or of two prompts with one completion: row numbers,
    clusters and probabilities. The second group is fixed where the groups are independent.
    """
    p = POLICY.probabilities(policy_at(drawn_at))
    rows = range(len(p))
    if not grouped:
        for pair in itertools.product(rows, rows):
            yield torch.tensor(pair), torch.tensor([5, 7]), float(p[pair[0]] * p[pair[1]])
        return
    for i, j in itertools.product(rows, rows):
        if POLICY.prompt_index[i] == POLICY.prompt_index[j]:
            yield torch.tensor([i, j]), torch.tensor([3, 3]), float(p[i] * p[j] * POLICY.num_prompts)


@pytest.mark.parametrize(
    ("name", "grouped", "drawn_at"),
    [("reward", True, 0.0), ("reward", True, 0.4), ("reward", False, 1.0), ("length", True, 1.0)],
    ids=["drawn before", "drawn by an earlier policy", "drawn after, one a prompt", "length, drawn after"],
)
def test_values_changes_and_derivatives_are_unbiased(name, grouped, drawn_at):
    values, found = QUANTITIES[name], torch.zeros(4, dtype=torch.float64)
    ends = [log_weights(share, drawn_at) for share in (0, 1)]
    for rows, prompts, probability in samples(grouped, drawn_at):
        before, after = (expectation_terms(values[rows], end[rows], prompts) for end in ends)
        assert before.terms.denominator.tolist() == after.terms.denominator.tolist() == [1, 1]
        columns = before.terms, after.terms, before.tangents, after.tangents
        found += probability * torch.stack([column.numerator.mean() for column in columns])
    exact = [f(values, share) for f in (lambda *at: float(expectation(*at)), slope) for share in (0, 1)]
    torch.testing.assert_close(found, torch.tensor(exact, dtype=torch.float64), rtol=1e-12, atol=1e-14)


def test_the_changes_are_those_of_the_means():
    rows, prompts = torch.tensor([0, 3, 9, 12, 7, 7]), torch.tensor([1, 1, 2, 2, 3, 3])
    before, after = (expectation_terms(REWARD[rows], log_weights(share, 0.4)[rows], prompts) for share in (0, 1))
    changes = {name: float(change.value) for name, change in step_changes(before, after).items()}
    start, end = (float(point.terms.numerator.mean()) for point in (before, after))
    slopes = [float(point.tangents.numerator.mean()) for point in (before, after)]
    assert changes == pytest.approx({"measured": end - start, "linear": slopes[0], "trapezoid": sum(slopes) / 2})


def test_a_baseline_with_the_completion_itself_shrinks_the_change():
    """The group's own mean, which holds the completion: the change is too small by the factor 1 - 1/G, exactly."""
    ends, found = [log_weights(share, 0.0)[:, 0].exp() for share in (0, 1)], 0.0
    for rows, _, probability in samples(True, 0.0):
        values = REWARD[rows]
        found += probability * float(((ends[1] - ends[0])[rows] * (values - values.mean())).mean())
    exact = float(expectation(REWARD, 1) - expectation(REWARD, 0))
    assert found == pytest.approx(exact / 2, rel=1e-12)


def test_only_sums_over_tokens_may_take_the_weight_of_what_came_before():
    """A terminal number by the weight before its last token is biased; a length by per-decision weights is not."""
    logps, sampling = POLICY.score(policy_at(1))[1], POLICY.score(policy_at(0))[1]
    p, zeros = POLICY.probabilities(policy_at(0)), torch.zeros_like(logps)
    by_decision = point_terms((zeros,), (logps,), sampling, MASK).terms.denominator
    assert float(p @ by_decision) == pytest.approx(float(expectation(LENGTH, 1)), rel=1e-12)
    last = MASK.sum(1) - 1
    before_last = (logps - sampling).cumsum(1) - (logps - sampling)
    terminal = before_last.gather(1, last[:, None]).squeeze(1).exp() * REWARD
    exact = float(expectation(REWARD, 1))
    assert abs(float(p @ terminal) - exact) > 0.1 * abs(exact - float(expectation(REWARD, 0)))


def test_a_number_that_some_completions_lack_is_meant_of_those_that_have_one():
    """On the whole population, weighed by its probabilities at the start: E[f | f exists] at either end."""
    values = REWARD.where(POLICY.token_ids[:, 0] != 0, torch.nan)
    known, p = ~values.isnan(), POLICY.probabilities(policy_at(0))
    terms = [expectation_terms(values, log_weights(share, 0.0), POLICY.prompt_index) for share in (0, 1)]
    for share, point in zip((0, 1), terms, strict=True):
        q = POLICY.probabilities(policy_at(share))
        top, bottom = (float(p @ column) for column in point.terms)
        assert top / bottom == pytest.approx(float(q[known] @ values[known] / q[known].sum()), rel=1e-12)
    none = expectation_terms(torch.full_like(values, torch.nan), log_weights(0, 0.0), POLICY.prompt_index)
    assert policy_entropy(none.terms).value.isnan()


@pytest.mark.parametrize("lacking", [False, True], ids=["every completion", "some lack the number"])
def test_coefficients_make_the_first_order_change(lacking):
    """(T22): sum_i c_i dS_i is the derivative that `delta_linear` returns."""
    rows, prompts = torch.tensor([0, 3, 9, 12, 7, 7]), torch.tensor([1, 1, 2, 2, 3, 3])
    values, weights = REWARD[rows].clone(), log_weights(0, 1.0)[rows]
    if lacking:
        values[4] = torch.nan
    point = expectation_terms(values, weights, prompts)
    found = slope_coefficients(values, weights, prompts) @ weights[:, 1]
    torch.testing.assert_close(found, delta_linear(point.terms, point.tangents).value)


def test_the_baseline_is_of_other_completions():
    values, prompts = torch.tensor([1.0, 2.0, 6.0, 0.0, 4.0]), torch.tensor([9, 9, 9, 2, 2])
    assert baseline(values, prompts).tolist() == [4.0, 3.5, 1.5, 4.0, 0.0]
    assert baseline(values, torch.tensor([9, 9, 9, 2, 3])).tolist() == [3.0, 2.75, 1.75, 3.25, 2.25]
    assert baseline(values[:1], prompts[:1]).tolist() == [0.0]


def redraws(num_prompts, num_generations, repeats, seed=0):
    """Changes of many samples of completions that the policy after the step drew, and the true change."""
    policy = TinyPolicy(max_length=3, num_prompts=8, seed=5)
    values = (policy.token_ids == 1).any(1).double() + 0.5 * policy.prompt_index
    generator, ends = torch.Generator().manual_seed(seed), [log_weights(share, 1.0, policy) for share in (0, 1)]
    p = policy.probabilities(policy_at(1, policy))
    found = []
    for _ in range(repeats):
        prompts = torch.randint(policy.num_prompts, (num_prompts,), generator=generator)
        rows = torch.multinomial(
            p * (policy.prompt_index == prompts[:, None]), num_generations, replacement=True, generator=generator
        ).flatten()
        clusters = torch.arange(num_prompts).repeat_interleave(num_generations)
        points = [expectation_terms(values[rows], end[rows], clusters) for end in ends]
        found.append(delta_measured(*(point.terms for point in points)).estimate(clusters))
    truth = float(expectation(values, 1, policy) - expectation(values, 0, policy))
    return found, truth


@pytest.mark.slow
@pytest.mark.parametrize("size", [(16, 8), (64, 1)], ids=["groups", "one completion a prompt"])
def test_intervals_cover_over_redraws(size):
    found, truth = redraws(*size, 300)
    summary = coverage(found, truth)
    assert 0.92 <= summary.covered <= 0.98
    assert summary.stderr_ratio == pytest.approx(1, abs=0.1)
    assert abs(summary.bias) < 3 * summary.scatter / 300**0.5
