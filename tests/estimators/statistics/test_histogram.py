"""The histogram agrees with the sorted values it no longer holds, however they were split."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trl_entropy.estimators.statistics.histogram import LogRatioHistogram

RELATIVE_ERROR = 10 ** (0.5 / 32) - 1  # half a bin of 32 a decade


def histogram_of(values, mask=None):
    values = torch.as_tensor(values, dtype=torch.float64)
    return LogRatioHistogram.empty().update(
        values, torch.ones_like(values, dtype=torch.bool) if mask is None else mask
    )


def sorted_quantile(values, q):
    """The slow oracle: the ceil(q n)-th smallest of the values themselves."""
    return sorted(values)[max(1, math.ceil(q * len(values))) - 1]


log_ratios = st.one_of(
    st.just(0.0),
    st.floats(-99.0, 99.0).filter(lambda x: abs(x) >= 1e-8),
    st.floats(-1e-3, 1e-3).filter(lambda x: abs(x) >= 1e-8),
)


@given(st.lists(log_ratios, min_size=1, max_size=60), st.floats(0, 1))
def test_quantile_is_that_of_the_sorted_values_to_half_a_bin(values, q):
    expected = sorted_quantile(values, q)
    assert histogram_of(values).quantile(q) == pytest.approx(expected, rel=RELATIVE_ERROR * (1 + 1e-9), abs=0.0)


@given(st.lists(log_ratios, min_size=2, max_size=40), st.data())
def test_any_split_and_order_gives_the_same_histogram(values, data):
    cut = data.draw(st.integers(0, len(values)))
    shuffled = data.draw(st.permutations(values))
    whole, parts = histogram_of(values), histogram_of(shuffled[cut:]).merge(histogram_of(shuffled[:cut]))
    assert torch.equal(whole.counts, parts.counts)
    assert (whole.maximum, whole.minimum) == (parts.maximum, parts.minimum)
    assert whole.mean == pytest.approx(math.fsum(values) / len(values), rel=1e-12, abs=1e-12)
    assert parts.mean == pytest.approx(whole.mean, rel=1e-12, abs=1e-12)


@given(st.lists(log_ratios, min_size=3, max_size=40), st.floats(0, 1))
def test_symmetric_about_zero(values, q):
    histogram, mirrored = histogram_of(values), histogram_of([-v for v in values])
    assert torch.equal(histogram.counts[:-1], mirrored.counts[:-1].flip(0))


def test_exact_zero_is_not_a_small_number():
    assert histogram_of([-1.0, 0.0, 0.0, 0.0, 2.0]).quantile(0.5) == 0.0
    assert 0.0 < histogram_of([-1.0, 1e-12, 1e-12, 1e-12, 2.0]).quantile(0.5) <= 1e-8


def test_extremes_beyond_the_edges_are_exact_and_infinities_are_kept():
    values = [-1e4, -5e3, 0.0, 5e3, 1e4]
    histogram = histogram_of(values)
    assert [histogram.quantile(q) for q in (0.0, 1.0)] == [-1e4, 1e4]
    assert histogram.quantile(0.4) == -100.0  # only the edge of the open bin is known
    assert histogram_of([-math.inf, 1.0, math.inf]).quantile(1.0) == math.inf


def test_masked_values_leave_no_trace_and_an_unmasked_nan_is_not_hidden():
    values, mask = [[1.0, math.nan], [2.0, 1e9]], torch.tensor([[1, 0], [1, 0]])
    masked, plain = histogram_of(values, mask), histogram_of([1.0, 2.0])
    assert torch.equal(masked.counts, plain.counts)
    assert (masked.count, masked.mean, masked.maximum) == (2, 1.5, 2.0)
    broken = histogram_of([1.0, math.nan, 2.0])
    assert broken.count == 3
    assert math.isnan(broken.quantile(0.5))
    assert math.isnan(broken.mean)


def test_empty():
    for empty in (LogRatioHistogram.empty(), histogram_of([]), histogram_of([1.0], torch.zeros(1, dtype=torch.bool))):
        assert empty.count == 0
        assert (float(empty.maximum), float(empty.minimum)) == (-math.inf, math.inf)
        assert math.isnan(empty.quantile(0.5))
        assert math.isnan(empty.mean)
