"""Quantiles of |x| over many tensors from fixed logarithmic bins, for summaries of optimizer moments."""

import math
from collections.abc import Iterable

import torch
from jaxtyping import Float, Int
from torch import Tensor

_SMALLEST, _LARGEST, _BINS_PER_DECADE = -46, 10, 32  # decades of |x|: the whole range of float32
_NUM_BINS = (_LARGEST - _SMALLEST) * _BINS_PER_DECADE
_CHUNK = 2**24  # values that have a bin's number of 8 bytes at a time


def magnitude_counts(tensors: Iterable[Float[Tensor, "..."]]) -> Int[Tensor, " bins"]:
    """
    Counts of |x| over all tensors in fixed logarithmic bins, without zeros; counts of ranks can be added.

    There are 32 bins to a decade from 1e-46 to 1e10; values beyond these are counted in the outermost bins. The
    tensors are on one device, and so are the counts; nothing is read by the host.
    """
    chunks = (chunk for tensor in tensors for chunk in tensor.detach().flatten().split(_CHUNK))
    counts = sum(map(_counts_of, chunks), torch.zeros((), dtype=torch.int64))
    return counts.expand(_NUM_BINS + 1)[:_NUM_BINS]


def _counts_of(values: Float[Tensor, " n"]) -> Int[Tensor, " one_more"]:
    """The counts of some values, and behind them that of zeros and nans."""
    magnitudes = values.abs()
    decades = magnitudes.float().log10()
    # clamped before the cast, in which an infinity would become the smallest integer
    index = ((decades - _SMALLEST) * _BINS_PER_DECADE).clamp(0, _NUM_BINS - 1).long().where(magnitudes > 0, _NUM_BINS)
    # Not `bincount`, which reads the largest index
    counts = torch.zeros(_NUM_BINS + 1, dtype=torch.int64, device=values.device)
    return counts.index_add_(0, index, counts.new_ones(()).expand(len(index)))


def magnitude_quantile(counts: Int[Tensor, " bins"], q: float) -> float:
    """
    The q-quantile of the counted |x| as the geometric middle of its bin, within 3.7 %. Without any value: nan. The
    counts should be on the CPU, as the host reads two numbers of them.
    """
    total = int(counts.sum())
    if total == 0:
        return math.nan
    index = int(torch.searchsorted(counts.cumsum(0), max(1, math.ceil(q * total))))
    return 10 ** (_SMALLEST + (index + 0.5) / _BINS_PER_DECADE)
