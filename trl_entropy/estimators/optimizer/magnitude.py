"""Quantiles of |x| over many tensors from fixed logarithmic bins, for summaries of optimizer moments."""

import math
from collections.abc import Iterable

import torch
from jaxtyping import Float, Int
from torch import Tensor

_SMALLEST, _LARGEST, _BINS_PER_DECADE = -46, 10, 32  # decades of |x|: the whole range of float32
_NUM_BINS = (_LARGEST - _SMALLEST) * _BINS_PER_DECADE


def magnitude_counts(tensors: Iterable[Float[Tensor, "..."]]) -> Int[Tensor, " bins"]:
    """
    Counts of |x| over all tensors in fixed logarithmic bins, without zeros; counts of ranks can be added.

    There are 32 bins to a decade from 1e-46 to 1e10; values beyond these are counted in the outermost bins.
    """
    counts = torch.zeros(_NUM_BINS, dtype=torch.int64)
    for tensor in tensors:
        magnitudes = tensor.detach().abs()
        decades = magnitudes[magnitudes > 0].float().log10()
        # clamped before the cast, in which an infinity would become the smallest integer
        index = ((decades - _SMALLEST) * _BINS_PER_DECADE).clamp(0, _NUM_BINS - 1).long()
        counts += torch.bincount(index, minlength=_NUM_BINS).cpu()
    return counts


def magnitude_quantile(counts: Int[Tensor, " bins"], q: float) -> float:
    """The q-quantile of the counted |x| as the geometric middle of its bin, within 3.7 %. Without any value: nan."""
    total = int(counts.sum())
    if total == 0:
        return math.nan
    index = int(torch.searchsorted(counts.cumsum(0), max(1, math.ceil(q * total))))
    return 10 ** (_SMALLEST + (index + 0.5) / _BINS_PER_DECADE)
