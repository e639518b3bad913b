"""The Fisher kernel (T12), its sketch (T13) and its exact diagonal, made of per-row gradients as they come."""

from collections.abc import Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor

from trl_entropy.estimators.kernel.sketch import CountSketch
from trl_entropy.estimators.rows.row_gradients import RowGradients
from trl_entropy.estimators.rows.row_sums import ByName, Consumer, Rows

_BLOCK_COLUMNS = 2**14


def blockwise_gram(x: Float[Tensor, "N D"], y: Float[Tensor, "M D"]) -> Float[Tensor, "N M"]:
    """
    X Y' in float64, summed over blocks of columns whose products are made in the rows' own dtype.

    For float32 rows the error is about 1e-7 of |x_n| |y_m|, and the time on a CPU a third of that of products in
    float64. On a GPU TF32 must be off. Cost O(N M D).
    """
    gram = x.new_zeros(len(x), len(y), dtype=torch.float64)
    for part, other in zip(x.split(_BLOCK_COLUMNS, dim=1), y.split(_BLOCK_COLUMNS, dim=1), strict=True):
        gram += part @ other.T
    return gram


class Gram(Consumer):
    """
    (T12): G_n' M G_m of every pair of rows, float64, in `values` (N, N). Local to the process.

    If one micro-batch holds all rows, products are taken of each parameter's gradients as they come and no gradient is
    kept, so that memory is that of the largest parameter's rows. Otherwise float32 rows of all parameters are kept
    until the end.

    Args:
        num_rows: N.
        metric: the diagonal of M by parameter name, 0 or more.

    Raises:
        ValueError: if `metric` does not fit the parameters, or rows come again after a batch of all of them.
    """

    def __init__(self, num_rows: int, metric: ByName) -> None:
        self.num_rows = num_rows
        self._scale = {name: values.sqrt() for name, values in metric.items()}
        self._order: Int[Tensor, " N"] | None = None
        self._rows: Rows | None = None

    def bind(self, shapes: Mapping[str, torch.Size], device: torch.device) -> None:
        self._shapes, self._device = shapes, device
        self._gram = torch.zeros(self.num_rows, self.num_rows, dtype=torch.float64, device=device)

    def begin(self, rows: Int[Tensor, " R"]) -> None:
        if self._order is not None:
            raise ValueError(f"rows {rows.tolist()} came again after a batch of all {self.num_rows} rows")
        if self._rows is None and len(rows) == self.num_rows:
            self._order = rows.argsort()
            return
        if self._rows is None:
            self._rows = Rows(self.num_rows, scale=self._scale)
            self._rows.bind(self._shapes, self._device)
        self._rows.begin(rows)

    def add(self, name: str, gradients: RowGradients, rows: Int[Tensor, " R"]) -> None:
        if self._rows is not None:
            self._rows.add(name, gradients, rows)
            return
        scaled = (gradients.whole * self._scale[name].to(gradients.whole.dtype)).flatten(1)
        self._gram += blockwise_gram(scaled, scaled)

    @property
    def values(self) -> Float[Tensor, "N N"]:
        if self._rows is not None:
            return blockwise_gram(self._rows.values, self._rows.values)
        assert self._order is not None, "no rows came yet"
        order = self._order.to(self._device)
        return self._gram[order][:, order]


class SketchedRows(Consumer):
    """
    (T13): every row's gradient as a CountSketch of R sqrt(M) G, float64, in `values` (N, dim). Local to the process.

    Args:
        num_rows: N.
        sketch: dimension and seed.
        metric: the diagonal of M by parameter name.
    """

    values: Float[Tensor, "N dim"]

    def __init__(self, num_rows: int, sketch: CountSketch, metric: ByName) -> None:
        self.num_rows, self.sketch, self.metric = num_rows, sketch, metric

    def bind(self, shapes: Mapping[str, torch.Size], device: torch.device) -> None:
        self.values = torch.zeros(self.num_rows, self.sketch.dim, dtype=torch.float64, device=device)

    def add(self, name: str, gradients: RowGradients, rows: Int[Tensor, " R"]) -> None:
        metric = self.metric[name].flatten()
        for part, grads in gradients.chunks():
            sketched = self.sketch.block(grads.flatten(1), name, metric)
            self.values.index_add_(0, rows[part], sketched)


class ParameterNorms(Consumer):
    """
    Each parameter's share of every G_n' M G_n, float64, in `values` (K, N), parameters in their order. Local to the
    process.

    All sequences of a row must come in one micro-batch; a single completion always does. The sum over parameters is
    the diagonal of K, exact even where K is sketched; the sums over rows tell which layers and matrices make its
    trace.
    """

    values: Float[Tensor, "K N"]

    def __init__(self, num_rows: int, metric: ByName) -> None:
        self.num_rows, self.metric = num_rows, metric

    def bind(self, shapes: Mapping[str, torch.Size], device: torch.device) -> None:
        self._numbers = {name: number for number, name in enumerate(shapes)}
        self.values = torch.zeros(len(shapes), self.num_rows, dtype=torch.float64, device=device)

    def add(self, name: str, gradients: RowGradients, rows: Int[Tensor, " R"]) -> None:
        norms = gradients.squared_norms(self.metric[name])
        self.values[self._numbers[name]].index_add_(0, rows, norms.to(self.values))
