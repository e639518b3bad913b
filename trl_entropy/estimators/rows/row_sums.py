"""Norms, dot products and sums of per-row gradients, made as these come: by parameter and by micro-batch.

A *row* is whatever the caller gives a number: a sequence, or a group of sequences whose gradients are summed.
"""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from trl_entropy.estimators.rows.row_gradients import RowGradients

ByName = Mapping[str, Float[Tensor, "..."]]


class Consumer:
    """Takes each parameter's gradients once per micro-batch; most make `values` of them."""

    values: Float[Tensor, "..."]

    def bind(self, shapes: Mapping[str, torch.Size], device: torch.device) -> None:
        """Called once, before everything else, with the shapes of the trainable parameters in their order."""

    def begin(self, rows: Int[Tensor, " R"]) -> None:
        """Called before each micro-batch, with the numbers of its rows, on the CPU and each once."""

    def add(self, name: str, gradients: RowGradients, rows: Int[Tensor, " R"]) -> None:
        """
        Called with each parameter's gradients for these rows; parameters come in any order. The numbers are on the
        device of `bind`, and nothing here may make the host wait for it: there are as many calls as parameters.
        """
        raise NotImplementedError


class SquaredNorms(Consumer):
    """
    G_n' M G_n of every row's gradient, (T14), (T16); float64, in `values` (N,).

    Local to the process. A square needs the whole sum, so that all sequences of a row must come in one micro-batch.
    Where groups are scattered over micro-batches, collect `Rows` and square these.

    Args:
        num_rows: N.
        metric: the diagonal of M by parameter name, by default 1.

    Raises:
        ValueError: if a row comes in a second micro-batch, or `metric` does not fit the parameters.
    """

    values: Float[Tensor, " N"]

    def __init__(self, num_rows: int, metric: ByName | None = None) -> None:
        self.num_rows, self.metric = num_rows, metric

    def bind(self, shapes: Mapping[str, torch.Size], device: torch.device) -> None:
        _check_shapes("metric", self.metric, shapes)
        self._seen = torch.zeros(self.num_rows, dtype=torch.bool)
        self.values = torch.zeros(self.num_rows, dtype=torch.float64, device=device)

    def begin(self, rows: Int[Tensor, " R"]) -> None:
        _check_numbers(rows, self.num_rows)
        if (again := rows[self._seen[rows]]).numel():
            raise ValueError(
                f"rows {again.tolist()} came in an earlier micro-batch, and a squared norm needs all sequences of a "
                "row at once: put whole groups into each micro-batch, or collect Rows and square them"
            )
        self._seen[rows] = True

    def add(self, name: str, gradients: RowGradients, rows: Int[Tensor, " R"]) -> None:
        norms = gradients.squared_norms(self.metric and self.metric[name])
        self.values.index_add_(0, rows, norms.to(self.values))


class DotProducts(Consumer):
    """
    G_n . v_k of every row's gradient with K vectors, (T9); float64, in `values` (K, N). Local to the process.

    Args:
        num_rows: N.
        vectors: each by parameter name, all trainable parameters.

    Raises:
        ValueError: if a vector does not fit the parameters.
    """

    values: Float[Tensor, "K N"]

    def __init__(self, num_rows: int, vectors: Sequence[ByName]) -> None:
        self.num_rows, self.vectors = num_rows, vectors

    def bind(self, shapes: Mapping[str, torch.Size], device: torch.device) -> None:
        for number, vector in enumerate(self.vectors):
            _check_shapes(f"vector {number}", vector, shapes)
        self.values = torch.zeros(len(self.vectors), self.num_rows, dtype=torch.float64, device=device)

    def begin(self, rows: Int[Tensor, " R"]) -> None:
        _check_numbers(rows, self.num_rows)

    def add(self, name: str, gradients: RowGradients, rows: Int[Tensor, " R"]) -> None:
        dots = gradients.dots([vector[name] for vector in self.vectors])
        self.values.index_add_(1, rows, dots.to(self.values))


class RowTotal(Consumer):
    """
    The sum of all rows' gradients, by parameter, in `by_name`: one float32 vector of D numbers. Local to the process.

    No row is written out for it: a linear layer's is one product of factors.
    """

    by_name: dict[str, Float[Tensor, "..."]]

    def bind(self, shapes: Mapping[str, torch.Size], device: torch.device) -> None:
        self.by_name = {name: torch.zeros(shape, dtype=torch.float32, device=device) for name, shape in shapes.items()}

    def add(self, name: str, gradients: RowGradients, rows: Int[Tensor, " R"]) -> None:
        self.by_name[name] += gradients.total()


class Rows(Consumer):
    """
    The gradients themselves, in one buffer `values` (N, D), with D in the order of `trainable_parameters`. Local to
    the process.

    A row that comes in several micro-batches is summed in the buffer's dtype, which should then be float32.

    Args:
        num_rows: N. The buffer holds N x D numbers of `dtype`.
        dtype: of the buffer. A gradient is rounded to it once, after scaling.
        scale: factors by parameter name; with sqrt(M), `values @ values.T` is the kernel of (T12).
        out: a buffer (N, D) to use again, in its own dtype; rows that do not come are left as they are.

    Attributes:
        columns: each parameter's share of D.

    Raises:
        ValueError: if `scale` or `out` does not fit the parameters.
    """

    values: Float[Tensor, "N D"]
    columns: dict[str, slice]

    def __init__(
        self,
        num_rows: int,
        dtype: torch.dtype = torch.float32,
        scale: ByName | None = None,
        out: Float[Tensor, "N D"] | None = None,
    ) -> None:
        self.num_rows, self.dtype, self.scale, self.out = num_rows, dtype, scale, out

    def bind(self, shapes: Mapping[str, torch.Size], device: torch.device) -> None:
        _check_shapes("scale", self.scale, shapes)
        self._written = torch.zeros(self.num_rows, dtype=torch.bool)
        self.columns, end = {}, 0
        for name, shape in shapes.items():
            self.columns[name] = slice(end, end := end + shape.numel())
        if self.out is not None and self.out.shape != (self.num_rows, end):
            raise ValueError(f"out has shape {tuple(self.out.shape)} for {self.num_rows} rows of {end} numbers")
        new = self.out is None
        self.values = torch.zeros(self.num_rows, end, dtype=self.dtype, device=device) if new else self.out
        self._blocks = {name: self.values[:, self.columns[name]].unflatten(1, shape) for name, shape in shapes.items()}

    def begin(self, rows: Int[Tensor, " R"]) -> None:
        _check_numbers(rows, self.num_rows)
        written = self._written[rows]
        self._is_sum = bool(written.any())
        if self._is_sum and self.out is not None:
            self.values[rows[~written].to(self.values.device)] = 0
        # The first number where the others follow it, so that rows are written by a slice
        self._first = int(rows[0]) if rows.numel() and bool((rows.diff() == 1).all()) else None
        self._written[rows] = True

    def add(self, name: str, gradients: RowGradients, rows: Int[Tensor, " R"]) -> None:
        block = self._blocks[name]
        for part, grads in gradients.chunks():
            scaled = grads if self.scale is None else grads * self.scale[name].to(grads.dtype)
            if self._is_sum:
                block.index_add_(0, rows[part], scaled.to(block.dtype))
            elif self._first is not None:
                block[self._first + part.start : self._first + part.stop] = scaled
            else:
                block.index_copy_(0, rows[part], scaled.to(block.dtype))


class HalfProducts(Consumer):
    """
    (T14): G_2n . G_2n+1 of every pair of rows, which are halves of a group; float64, in `values` (N,). Local to the
    process.

    Both rows of a pair must come in one micro-batch.
    """

    values: Float[Tensor, " N"]

    def __init__(self, num_pairs: int) -> None:
        self.num_pairs = num_pairs

    def bind(self, shapes: Mapping[str, torch.Size], device: torch.device) -> None:
        self.values = torch.zeros(self.num_pairs, dtype=torch.float64, device=device)

    def begin(self, rows: Int[Tensor, " R"]) -> None:
        if rows.tolist() != [number for pair in (rows // 2).unique().tolist() for number in (2 * pair, 2 * pair + 1)]:
            raise ValueError(f"rows {rows.tolist()} are not whole pairs of halves 2n, 2n + 1")

    def add(self, name: str, gradients: RowGradients, rows: Int[Tensor, " R"]) -> None:
        whole = gradients.whole
        products = (whole[0::2] * whole[1::2]).flatten(1).sum(dim=1)
        self.values.index_add_(0, rows[0::2] // 2, products.to(self.values))


class Several(Consumer):
    """Passes everything on to each of its `consumers`, so that one pass serves them all."""

    def __init__(self, *consumers: Consumer) -> None:
        self.consumers = consumers

    def bind(self, shapes: Mapping[str, torch.Size], device: torch.device) -> None:
        for consumer in self.consumers:
            consumer.bind(shapes, device)

    def begin(self, rows: Int[Tensor, " R"]) -> None:
        for consumer in self.consumers:
            consumer.begin(rows)

    def add(self, name: str, gradients: RowGradients, rows: Int[Tensor, " R"]) -> None:
        for consumer in self.consumers:
            consumer.add(name, gradients, rows)


def _check_numbers(rows: Int[Tensor, " R"], num_rows: int) -> None:
    if rows.numel() and int(rows.max()) >= num_rows:
        raise ValueError(f"row {int(rows.max())} of a consumer for {num_rows} rows: they are numbered from 0")


def _check_shapes(what: str, values: ByName | None, shapes: Mapping[str, torch.Size]) -> None:
    if values is None:
        return
    for name, shape in shapes.items():
        if name not in values:
            raise ValueError(f"{what} has nothing for the trainable parameter {name!r}")
        if values[name].shape != shape:
            raise ValueError(f"{what} has shape {tuple(values[name].shape)} for {name!r} of {tuple(shape)}")
