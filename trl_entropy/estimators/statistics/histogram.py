"""A histogram of log-ratios with fixed bins, so that those of ranks and micro-batches can be added."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

_BINS_PER_DECADE = 32
_SMALLEST, _LARGEST = -8, 2  # decades of |log-ratio|: below float32 rounding, above any ratio a float can hold
_NUM_EDGES = (_LARGEST - _SMALLEST) * _BINS_PER_DECADE + 1
_ZERO_BIN = _NUM_EDGES + 1
_NAN_BIN = 2 * _ZERO_BIN + 1
NUM_BINS = _NAN_BIN + 1


def _edges(device: torch.device | None = None) -> Float[Tensor, " edges"]:
    return torch.logspace(_SMALLEST, _LARGEST, _NUM_EDGES, dtype=torch.float64, device=device)


@dataclass(frozen=True)
class LogRatioHistogram:
    """Counts of log-ratios in fixed, signed-logarithmic bins, with their exact sum and extrema.

    Bins are symmetric about zero, 32 to a decade of |x| from 1e-8 to 1e2, with one bin for exactly zero, one at each
    end for values beyond, and one for nan. To merge ranks add `counts` and `total`, and take the larger `maximum` and
    the smaller `minimum`. An empty histogram has extrema -inf and inf, mean nan and quantiles nan. Units: those of the
    values (nats for a log-ratio). Error of a quantile: at most 3.7 % of its value for 1e-8 <= |x| <= 1e2, below 1e-8
    at most 1e-8; exact at zero and at both extremes.
    """

    counts: Int[Tensor, " bins"]
    total: Float[Tensor, ""]
    maximum: Float[Tensor, ""]
    minimum: Float[Tensor, ""]

    @classmethod
    def empty(cls, device: torch.device | str | None = None) -> "LogRatioHistogram":
        """The histogram of no values, on `device`."""
        scalar = {"dtype": torch.float64, "device": device}
        return cls(
            counts=torch.zeros(NUM_BINS, dtype=torch.int64, device=device),
            total=torch.zeros((), **scalar),
            maximum=torch.full((), -math.inf, **scalar),
            minimum=torch.full((), math.inf, **scalar),
        )

    def update(
        self, values: Float[Tensor, "*shape"], mask: Bool[Tensor, "*shape"] | Int[Tensor, "*shape"]
    ) -> "LogRatioHistogram":
        """The histogram with the values added where `mask` is true; other values may be anything, nan included."""
        if values.numel() == 0:
            return self
        mask = mask.bool()
        values = values.detach().double()
        added = LogRatioHistogram(
            counts=torch.zeros_like(self.counts).scatter_add(0, _bin_index(values).flatten(), mask.flatten().long()),
            total=values.where(mask, 0.0).sum(),
            maximum=values.where(mask, -math.inf).amax(),
            minimum=values.where(mask, math.inf).amin(),
        )
        return self.merge(added)

    def merge(self, other: "LogRatioHistogram") -> "LogRatioHistogram":
        """The histogram of both sets of values."""
        return LogRatioHistogram(
            counts=self.counts + other.counts,
            total=self.total + other.total,
            maximum=torch.maximum(self.maximum, other.maximum),
            minimum=torch.minimum(self.minimum, other.minimum),
        )

    @property
    def count(self) -> int:
        """The number of values."""
        return int(self.counts.sum())

    @property
    def mean(self) -> float:
        """The exact mean, sum over count; nan when empty."""
        return float(self.total / self.counts.sum())

    def quantile(self, q: float) -> float:
        """The ceil(q n)-th smallest value, to the width of its bin; nan when empty or when any value was nan."""
        count = self.count
        if count == 0 or self.counts[_NAN_BIN] > 0:
            return math.nan
        rank = max(1, math.ceil(q * count))
        if rank in (1, count):
            return float(self.minimum if rank == 1 else self.maximum)
        index = int(torch.searchsorted(self.counts.cumsum(0), rank))
        # The exact extremes narrow the bin: they are the only knowledge about the open bins at both ends.
        return min(max(_bin_centre(index), float(self.minimum)), float(self.maximum))


def _bin_index(values: Float[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
    distance = 1 + torch.bucketize(values.abs(), _edges(values.device))
    sign = (values > 0).long() - (values < 0).long()
    return (_ZERO_BIN + sign * distance).where(~values.isnan(), _NAN_BIN)


def _bin_centre(index: int) -> float:
    """The geometric middle of a bin with its sign; for a bin that is open or reaches zero, its finite edge."""
    distance = abs(index - _ZERO_BIN)
    if distance == 0:
        return 0.0
    exponent = _SMALLEST + (distance - 1.5) / _BINS_PER_DECADE
    return math.copysign(10 ** min(max(exponent, _SMALLEST), _LARGEST), index - _ZERO_BIN)
