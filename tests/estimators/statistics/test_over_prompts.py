"""Intervals over prompts against loops, and the set of shares that are not refuted; their coverage."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trl_entropy.estimators.statistics.over_prompts import ratio_intervals, share_intervals
from trl_entropy.estimators.statistics.student_t import student_t_quantile

NUMERATORS = torch.tensor([[0.3, 2.0, 0.1, 1.7], [0.3, 2.0, 0.0, 1.7]], dtype=torch.float64).T
DENOMINATORS = torch.tensor([[1.0, 4.0, 2.0, 3.0], [1.0, 4.0, 0.0, 3.0]], dtype=torch.float64).T


def jackknife_by_loops(tops, bottoms):
    """Ratio, standard error and number of the prompts that have a part in it."""
    pairs = [(top, bottom) for top, bottom in zip(tops, bottoms, strict=True) if bottom]
    whole, num = sum(top for top, _ in pairs) / sum(bottom for _, bottom in pairs), len(pairs)
    left_out = []
    for kept in range(num):
        others = [pair for place, pair in enumerate(pairs) if place != kept]
        left_out.append(sum(top for top, _ in others) / sum(bottom for _, bottom in others))
    mean = sum(left_out) / num
    return whole, math.sqrt((num - 1) / num * sum((value - mean) ** 2 for value in left_out)), num


def test_ratios_against_loops():
    """The second column lacks a prompt, which must not count in its degrees of freedom."""
    found = ratio_intervals(NUMERATORS, DENOMINATORS, confidence=0.9)
    for column in range(2):
        value, stderr, num = jackknife_by_loops(NUMERATORS[:, column].tolist(), DENOMINATORS[:, column].tolist())
        margin = student_t_quantile(0.95, num - 1.0) * stderr
        assert found[column].tolist() == pytest.approx([value - margin, value + margin])


@given(st.lists(st.integers(0, 4), min_size=2, max_size=9))
def test_shares_are_those_not_refuted(num_correct):
    counts = torch.tensor(num_correct, dtype=torch.float64)[:, None]
    ((low, high),) = share_intervals(counts, torch.full_like(counts, 4)).tolist()
    value, stderr, num = jackknife_by_loops(num_correct, [4] * len(num_correct))
    trials = value * (1 - value) / stderr**2 if len(set(num_correct)) > 1 else num
    quantile = student_t_quantile(0.975, num - 1.0)
    assert 0 <= low <= value <= high <= 1 and high - low > 0.01
    for end in (low, high):
        assert end in (0.0, 1.0) or abs(end - value) == pytest.approx(
            quantile * math.sqrt(end * (1 - end) / trials), rel=1e-6
        )
    assert (low == 0.0) == (value == 0.0) and (high == 1.0) == (value == 1.0)


def test_one_prompt_equal_prompts_and_none():
    for intervals in (ratio_intervals, share_intervals):
        assert intervals(torch.ones(1, 2), torch.ones(1, 2)).isnan().all()
        assert intervals(torch.zeros(3, 1), torch.zeros(3, 1)).isnan().all()
    assert ratio_intervals(torch.ones(5, 1), torch.ones(5, 1)).tolist() == [[1.0, 1.0]]
    low, high = share_intervals(torch.ones(5, 1), torch.ones(5, 1))[0].tolist()
    quantile = student_t_quantile(0.975, 4.0)
    assert high == 1.0 and low == pytest.approx(5 / (5 + quantile**2))
