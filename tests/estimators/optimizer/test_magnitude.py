"""Quantiles of |x| over tensors against the sorted values themselves."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trl_entropy.estimators.optimizer.magnitude import magnitude_counts, magnitude_quantile

HALF_A_BIN = 10 ** (0.5 / 32) - 1  # 3.7 %


@given(st.lists(st.floats(-60, 20), min_size=1, max_size=40), st.floats(0, 1))
def test_quantile_of_the_sorted_values(exponents, q):
    values = [10**e * (-1) ** i for i, e in enumerate(exponents) if -44 < e < 10]
    counts = magnitude_counts([torch.tensor(values, dtype=torch.float64)])
    found = magnitude_quantile(counts, q)
    if not values:
        assert math.isnan(found)
        return
    expected = sorted(map(abs, values))[max(1, math.ceil(q * len(values))) - 1]
    # log10 in float32 has an error of its own, 4e-6 of a decade at 1e-44: and float32 has few digits down there
    tolerance = HALF_A_BIN * 1.001 if expected > 1e-37 else 1.0
    assert found == pytest.approx(expected, rel=tolerance, abs=0)


def test_zeros_are_no_values():
    counts = magnitude_counts([torch.tensor([0.0, 2.0, -0.0, 0.0])])
    assert int(counts.sum()) == 1
    assert magnitude_quantile(counts, 0.0) == magnitude_quantile(counts, 1.0) == pytest.approx(2.0, rel=HALF_A_BIN)
    assert math.isnan(magnitude_quantile(magnitude_counts([torch.zeros(3)]), 0.5))
    assert math.isnan(magnitude_quantile(magnitude_counts([]), 0.5))


def test_tensors_of_any_shape_and_type_add_up():
    tensors = [torch.randn(3, 4), torch.randn(7).bfloat16(), torch.randn((), dtype=torch.float64), torch.zeros(0)]
    together = magnitude_counts(tensors)
    assert torch.equal(together, sum(magnitude_counts([tensor]) for tensor in tensors))
    assert int(together.sum()) == 20


def test_what_lies_beyond_is_in_the_outermost_bin():
    counts = magnitude_counts([torch.tensor([1e12, 1e-60, math.inf], dtype=torch.float64)])
    assert (int(counts[0]), int(counts[-1])) == (1, 2)
    assert magnitude_quantile(counts, 1.0) == pytest.approx(1e10, rel=0.04)
