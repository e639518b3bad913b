"""Per-row gradients of one parameter, kept as the factors that a backward pass hands out and reduced from these.

A row is a sequence, or several sequences whose gradients are summed; their tokens then follow one another as in one
longer sequence. One object holds R rows of T tokens each, padded with tokens that have no gradient.

Sums over tokens are computed in the factors' dtype, which is float32 or float64.
"""

import abc
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

# How many numbers are written out at a time, but at least one row: 64 MiB in float32.
CHUNK_NUMEL = 2**24
# From this many tokens on an outer product with the longer side last takes half the time on a CPU, transposed or not.
_MANY_TOKENS = 128


@dataclass(frozen=True)
class Grouping:
    """Which sequences make up which row.

    Attributes:
        numbers: the numbers of the rows, each once.
        members: the sequences of each row, filled up with repetitions to one length; None if the rows follow one
            another and all have the same number of sequences.
        is_member: False where `members` was filled up.
    """

    num_sequences: int
    numbers: Int[Tensor, " R"]
    members: Int[Tensor, "R G"] | None = None
    is_member: Bool[Tensor, "R G"] | None = None

    def on(self, device: torch.device) -> "Grouping":
        """The same on the device of the gradients, moved once and not again for each parameter."""
        if self.members is None or self.is_member is None:
            return Grouping(self.num_sequences, self.numbers.to(device))
        moved = (tensor.to(device) for tensor in (self.numbers, self.members, self.is_member))
        return Grouping(self.num_sequences, *moved)

    @classmethod
    def of(cls, rows: Int[Tensor, " B"]) -> "Grouping":
        """On the CPU, where the numbers are looked at: one copy from the device, if they are on one."""
        rows = rows.cpu()
        wanted = (rows >= 0).nonzero().squeeze(1)
        in_order, run_lengths = rows.unique_consecutive(return_counts=True)
        ascending, alike = bool((in_order.diff() > 0).all()), len(run_lengths.unique()) == 1
        if len(wanted) == len(rows) and ascending and alike:
            return cls(len(rows), in_order)  # whole rows, one after another: nothing is copied
        numbers, counts = rows[wanted].unique(return_counts=True)
        if not len(numbers):
            raise ValueError(f"a batch without any row: {rows.tolist()}; -1 leaves a sequence out")
        if len(numbers) == len(rows):
            return cls(len(rows), rows)
        by_number = wanted[rows[wanted].argsort(stable=True)]
        slots = torch.arange(int(counts.max()))
        first = (counts.cumsum(0) - counts)[:, None]
        members = by_number[first + slots.minimum(counts[:, None] - 1)]
        return cls(len(rows), numbers, members, slots < counts[:, None])

    def row_of(self) -> Int[Tensor, " B"]:
        """The place of each sequence's row in `numbers`; R for those that are left out."""
        if self.members is None or self.is_member is None:
            places = torch.arange(len(self.numbers), device=self.numbers.device)
            return places.repeat_interleave(self.num_sequences // len(places))
        rows = self.numbers.new_full((self.num_sequences,), len(self.numbers))
        places = torch.arange(len(self.numbers), device=rows.device)[:, None].expand_as(self.members)
        rows[self.members[self.is_member]] = places[self.is_member]
        return rows

    def by_row(self, inputs: Tensor, grads: Float[Tensor, "B *T d"]) -> tuple[Tensor, Float[Tensor, "R T d"]]:
        """Token ids (B, *T) or features (B, *T, d), and gradients, rearranged as rows with one axis of tokens."""
        num_rows = len(self.numbers) if self.members is None else self.num_sequences
        # Tokens may come as (B T, d): the sequences then follow one another
        inputs = inputs.reshape(num_rows, -1, *inputs.shape[-1:] * inputs.is_floating_point())
        grads = grads.reshape(num_rows, -1, grads.shape[-1])
        if self.members is None or self.is_member is None:
            return inputs, grads
        grads = grads[self.members].where(self.is_member[:, :, None, None], 0.0)
        return inputs[self.members].flatten(1, 2), grads.flatten(1, 2)


class RowGradients(abc.ABC):
    """Gradients of one parameter, R rows of its shape, written out only as far as a reduction needs them.

    Attributes:
        num_rows: R.
        shape: of the parameter.
    """

    def __init__(self, num_rows: int, shape: tuple[int, ...]) -> None:
        self.num_rows, self.shape = num_rows, torch.Size(shape)

    @property
    @abc.abstractmethod
    def num_kept(self) -> int:
        """Numbers that are kept for all rows."""

    @abc.abstractmethod
    def dense(self, rows: slice) -> Float[Tensor, "R *shape"]:
        """The gradients of some rows, written out. They must not be changed."""

    @functools.cached_property
    def whole(self) -> Float[Tensor, "R *shape"]:
        """All rows, written out once for all callers. They must not be changed."""
        return self.dense(slice(0, self.num_rows))

    def chunks(self) -> Iterator[tuple[slice, Float[Tensor, "R *shape"]]]:
        """All rows with their places, written out at most `CHUNK_NUMEL` numbers at a time."""
        size = max(1, CHUNK_NUMEL // max(1, self.shape.numel()))
        if size >= self.num_rows:
            yield slice(0, self.num_rows), self.whole
            return
        for start in range(0, self.num_rows, size):
            rows = slice(start, min(start + size, self.num_rows))
            yield rows, self.dense(rows)

    def total(self) -> Float[Tensor, "*shape"]:
        """The sum of all rows."""
        return functools.reduce(torch.add, (grads.sum(0) for _, grads in self.chunks()))

    def squared_norms(self, metric: Float[Tensor, "*shape"] | None = None) -> Float[Tensor, " R"]:
        """G' M G of every row with the diagonal M = `metric`, by default 1."""
        return torch.cat([_squared_norms(grads, metric) for _, grads in self.chunks()])

    def dots(self, vectors: Sequence[Float[Tensor, "*shape"]]) -> Float[Tensor, "K R"]:
        """The dot product of every row with each of K vectors."""
        return torch.cat([_dots(grads, vectors) for _, grads in self.chunks()], dim=1)


class WrittenOut(RowGradients):
    """Gradients written out from the start: of a bias or a norm's weight, where they are no larger than factors."""

    def __init__(self, grads: Float[Tensor, "R *shape"]) -> None:
        super().__init__(len(grads), grads.shape[1:])
        self.grads = grads

    @property
    def num_kept(self) -> int:
        return self.grads.numel()

    def dense(self, rows: slice) -> Float[Tensor, "R *shape"]:
        return self.grads[rows]


class OuterProducts(RowGradients):
    """Gradients of a linear layer's weight, sum_t g_t x_t', from the layer's inputs x and its output gradients g.

    Multiplications per row: T i o to write it out; T^2 (i + o) for a norm without a metric, from the T x T products of
    tokens ("ghost" norm); T i o for a dot product, which from the factors needs no memory of the weight's size.
    """

    def __init__(self, inputs: Float[Tensor, "R T i"], grads: Float[Tensor, "R T o"]) -> None:
        super().__init__(len(grads), (grads.shape[-1], inputs.shape[-1]))
        self.inputs, self.grads = inputs, grads

    @property
    def num_kept(self) -> int:
        return self.inputs.numel() + self.grads.numel()

    @property
    def is_larger_than_whole(self) -> bool:
        """Whether the factors hold more numbers than the gradients: T (i + o) against i o."""
        return self.grads.shape[1] * sum(self.shape) > self.shape.numel()

    def dense(self, rows: slice) -> Float[Tensor, "R *shape"]:
        inputs, grads = self.inputs[rows], self.grads[rows]
        if self.shape[0] > self.shape[1] and grads.shape[1] >= _MANY_TOKENS:
            return torch.bmm(inputs.mT, grads).mT
        return torch.bmm(grads.mT, inputs)

    def total(self) -> Float[Tensor, "*shape"]:
        return self.grads.flatten(0, 1).mT @ self.inputs.flatten(0, 1)

    def squared_norms(self, metric: Float[Tensor, "*shape"] | None = None) -> Float[Tensor, " R"]:
        if metric is not None or self.is_larger_than_whole or "whole" in vars(self):
            return super().squared_norms(metric)
        products = torch.bmm(self.inputs, self.inputs.mT) * torch.bmm(self.grads, self.grads.mT)
        return products.sum(dim=(1, 2))

    def dots(self, vectors: Sequence[Float[Tensor, "*shape"]]) -> Float[Tensor, "K R"]:
        # For two or more vectors, reading written-out gradients costs less than T multiplications for each number.
        if len(vectors) != 1 or "whole" in vars(self):
            return super().dots(vectors)
        vector = vectors[0].to(self.grads.dtype)
        if self.shape[0] <= self.shape[1]:
            return (self.inputs @ vector.mT * self.grads).sum(dim=(1, 2))[None]
        return (self.grads @ vector * self.inputs).sum(dim=(1, 2))[None]


class Lookups(RowGradients):
    """Gradients of an embedding table: g_t is added to the line of token t. Norms and products cost T d per row."""

    def __init__(self, ids: Int[Tensor, "R T"], grads: Float[Tensor, "R T d"], num_embeddings: int) -> None:
        super().__init__(len(grads), (num_embeddings, grads.shape[-1]))
        self.ids, self.grads = ids, grads

    @property
    def num_kept(self) -> int:
        return self.grads.numel()

    def dense(self, rows: slice) -> Float[Tensor, "R *shape"]:
        ids, grads = self.ids[rows], self.grads[rows]
        tables = grads.new_zeros(len(ids) * self.shape[0], self.shape[1])
        return tables.index_add_(0, self._lines(ids).flatten(), grads.flatten(0, 1)).unflatten(0, (-1, self.shape[0]))

    def total(self) -> Float[Tensor, "*shape"]:
        return self.grads.new_zeros(self.shape).index_add_(0, self.ids.flatten(), self.grads.flatten(0, 1))

    def squared_norms(self, metric: Float[Tensor, "*shape"] | None = None) -> Float[Tensor, " R"]:
        used, place = self._lines(self.ids).unique(return_inverse=True)
        lines = self.grads.new_zeros(len(used), self.shape[1])
        lines.index_add_(0, place.flatten(), self.grads.flatten(0, 1))
        norms = _squared_norms(lines, None if metric is None else metric[used % self.shape[0]])
        return norms.new_zeros(self.num_rows).index_add_(0, used // self.shape[0], norms)

    def dots(self, vectors: Sequence[Float[Tensor, "*shape"]]) -> Float[Tensor, "K R"]:
        looked_up = (vector[self.ids].to(self.grads.dtype) for vector in vectors)
        return torch.stack([(lines * self.grads).sum(dim=(1, 2)) for lines in looked_up])

    def _lines(self, ids: Int[Tensor, "R T"]) -> Int[Tensor, "R T"]:
        """Line numbers in the R tables put one below the other."""
        return ids + self.shape[0] * torch.arange(len(ids), device=ids.device)[:, None]


class Sum(RowGradients):
    """Gradients of a parameter that is used more than once: the parts are added before anything is squared."""

    def __init__(self, parts: Sequence[RowGradients]) -> None:
        super().__init__(parts[0].num_rows, parts[0].shape)
        self.parts = parts

    @property
    def num_kept(self) -> int:
        return sum(part.num_kept for part in self.parts)

    def dense(self, rows: slice) -> Float[Tensor, "R *shape"]:
        return functools.reduce(torch.add, (part.dense(rows) for part in self.parts))

    def total(self) -> Float[Tensor, "*shape"]:
        return functools.reduce(torch.add, (part.total() for part in self.parts))

    def dots(self, vectors: Sequence[Float[Tensor, "*shape"]]) -> Float[Tensor, "K R"]:
        return functools.reduce(torch.add, (part.dots(vectors) for part in self.parts))


# Products and then their sum: a BLAS dot product adds 10^7 float32 numbers in sequence and is off by 3e-4.


def _squared_norms(grads: Float[Tensor, "R *shape"], metric: Float[Tensor, "..."] | None) -> Float[Tensor, " R"]:
    squares = grads.square() if metric is None else grads.square() * metric.to(grads.dtype)
    return squares.flatten(1).sum(dim=1)


def _dots(grads: Float[Tensor, "R *shape"], vectors: Sequence[Float[Tensor, "*shape"]]) -> Float[Tensor, "K R"]:
    return torch.stack([(grads * vector.to(grads.dtype)).flatten(1).sum(dim=1) for vector in vectors])
