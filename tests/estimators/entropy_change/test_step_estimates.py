"""All numbers of a step at once, against the slow way: a quantity, a change, a prompt left out at a time."""

import itertools
import math

import pytest
import torch

from trl_entropy.estimators.entropy_change.delta_entropy import RatioTerms, policy_entropy
from trl_entropy.estimators.entropy_change.expectation import baseline, expectation_terms
from trl_entropy.estimators.entropy_change.step_change import PointTerms, step_changes
from trl_entropy.estimators.entropy_change.step_estimates import step_estimates

SIZES = {"groups": (3, 3, 2, 4, 2, 5), "a prompt each": (1,) * 7, "three prompts": (2, 3, 2), "one prompt": (6,)}


def prompts_of(sizes):
    numbers = torch.tensor([11, 4, 30, 8, 2, 19, 7])[: len(sizes)]
    return numbers.repeat_interleave(torch.tensor(sizes))[torch.arange(sum(sizes)).flip(0)]


def random_point(count, parts, seed, quantities=()):
    generator = torch.Generator().manual_seed(seed)

    def column():
        return torch.rand(count, *quantities, dtype=torch.float64, generator=generator) + 0.5

    return PointTerms(*(RatioTerms(column(), column()) for _ in range(parts)))


def rows(point, chosen):
    return PointTerms(*(RatioTerms(*(column[chosen] for column in part)) for part in point if part is not None))


def one_quantity(point, place):
    return PointTerms(*(RatioTerms(*(column[:, place] for column in part)) for part in point if part is not None))


def same(found, expected):
    assert found.value == pytest.approx(expected.value, rel=1e-9, abs=1e-12)
    assert found.stderr == pytest.approx(expected.stderr, rel=1e-9, abs=1e-12, nan_ok=True)
    assert (found.dof, found.num_samples) == (expected.dof, expected.num_samples)


def assert_as_one_at_a_time(found, before, after, prompts, planned=None):
    changes = step_changes(before, after, planned)
    same(found.start, policy_entropy(before.terms).estimate(prompts))
    assert list(found.changes) == list(changes) and list(found.errors) == list(changes)[1:]
    for name, change in changes.items():
        same(found.changes[name], change.estimate(prompts))
        if name != "measured":
            same(found.errors[name], (change - changes["measured"]).estimate(prompts))
    numbers = prompts.unique(return_inverse=True)[1]
    assert len(found.halves) == (2 if int(numbers.max()) >= 3 else 0)
    for parity, half in enumerate(found.halves):
        part = numbers % 2 == parity
        points = [point and rows(point, part) for point in (before, after, planned)]
        expected = step_changes(*points)
        assert list(half) == list(expected)
        for name, change in expected.items():
            same(half[name], change.estimate(prompts[part]))


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("parts", [(2, 2, 3), (2, 2, 0), (2, 1, 0), (1, 1, 0)])
def test_every_number_is_that_of_the_slow_way(sizes, parts):
    prompts = prompts_of(sizes)
    before, after, planned = (
        random_point(len(prompts), count, seed) if count else None for seed, count in enumerate(parts)
    )
    (found,) = step_estimates(before, after, prompts, planned)
    assert_as_one_at_a_time(found, before, after, prompts, planned)
    assert math.isnan(found.changes["measured"].stderr) == (len(sizes) == 1)


def test_quantities_do_not_mix():
    prompts = prompts_of(SIZES["groups"])
    before, after = (random_point(len(prompts), 2, seed, (3,)) for seed in (5, 6))
    for place, found in enumerate(step_estimates(before, after, prompts)):
        assert_as_one_at_a_time(found, one_quantity(before, place), one_quantity(after, place), prompts)


def terms_by_loops(values, log_weights, prompts):
    """(T21), completion by completion: N, D, N', D'."""
    known, level = [not math.isnan(value) for value in values.tolist()], []
    groups = [prompts.tolist().count(prompt) for prompt in prompts.tolist()]
    for i in range(len(values)):
        others = [j for j in range(len(values)) if j != i and (min(groups) < 2 or prompts[j] == prompts[i])]
        level.append(sum(float(values[j]) for j in others) / max(len(others), 1))
    rows = []
    for i, (log_weight, slope) in enumerate(log_weights.tolist()):
        weight, value = math.exp(log_weight), float(values[i])
        if all(known):
            rows.append([weight * (value - level[i]) + level[i], 1.0, slope * weight * (value - level[i]), 0.0])
        else:
            top = [value if known[i] else 0.0, float(known[i])]
            rows.append([*(weight * x for x in top), *(slope * weight * x for x in top)])
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_terms_of_many_quantities_are_those_of_each(sizes):
    """Some complete, some that a few completions lack, and one that none has."""
    prompts, generator = prompts_of(sizes), torch.Generator().manual_seed(0)
    values = torch.randn(len(prompts), 4, dtype=torch.float64, generator=generator)
    values[2, 1], values[:, 3] = torch.nan, torch.nan
    log_weights = torch.randn(len(prompts), 2, dtype=torch.float64, generator=generator)
    together = expectation_terms(values, log_weights, prompts)
    for place, column in enumerate(values.unbind(1)):
        expected = terms_by_loops(column, log_weights, prompts)
        for found in (one_quantity(together, place), expectation_terms(column, log_weights, prompts)):
            table = torch.stack([*found.terms, *found.tangents], dim=1)
            torch.testing.assert_close(table, expected, equal_nan=True)
    for place, column in itertools.islice(enumerate(values.unbind(1)), 3):
        torch.testing.assert_close(baseline(values, prompts)[:, place], baseline(column, prompts), equal_nan=True)
