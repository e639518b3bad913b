"""
Per-sequence gradients of any module, by differentiating that module alone: its inputs were kept and the gradient of
its output is there, so each sequence's share is one product with the derivative of a small function.

Cost per backward pass: the module's forward and backward once more for every sequence, in one batched call where
`torch.func.vmap` can batch the module, else one sequence after the other. Memory: one gradient a row and parameter.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from accelerate.utils.memory import should_reduce_batch_size
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_leaves, tree_unflatten

from trl_entropy.config.settings_file import one_line
from trl_entropy.engine.parameters import replaced_tensors
from trl_entropy.estimators.rows import row_gradients
from trl_entropy.estimators.rows.row_gradients import Grouping, RowGradients, WrittenOut
from trl_entropy.gradients.layer_rules import Layer, LayerError, summable

logger = logging.getLogger(__name__)

# By how much the sum of a sequence's part of an output may differ when it is computed again, relative to that of the
# absolute values.
_ROUNDING = {torch.float64: 1e-6, torch.float32: 1e-4}
_ROUNDING_NARROW = 3e-2
_WAYS = ("batched", "sequence by sequence", "whole batch")
# The first of `_WAYS` that was not seen to fail, by module.
_WAY: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()


@dataclass(frozen=True)
class LayerCall:
    """
    What a module was called with, and what it gave.

    Attributes:
        leaves: of `(args, kwargs)`, as `torch.utils._pytree` flattens them.
        sums: by entry of the output's first axis, sum and sum of absolute values of each floating output.
        autocast: its dtype, where the module computed under it.
    """

    leaves: tuple[Any, ...]
    spec: TreeSpec
    sums: tuple[tuple[Tensor, Tensor], ...] = ()
    autocast: torch.dtype | None = None

    @property
    def first(self) -> Tensor:
        """Its first tensor, whose first axis has the sequences, or the tokens of one sequence after the other."""
        return next(leaf for leaf in self.leaves if isinstance(leaf, Tensor) and leaf.ndim)

    def arguments(self, leaves: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments and keywords with other leaves."""
        args, kwargs = tree_unflatten(leaves, self.spec)
        return args, kwargs

    @contextlib.contextmanager
    def as_called(self) -> Iterator[None]:
        """Under the autocast under which the module computed."""
        if self.autocast is None:
            yield
            return
        with torch.autocast(self.first.device.type, self.autocast, cache_enabled=False):
            yield


def floating(output: object) -> list[Tensor]:
    """The outputs of a module that may have a gradient."""
    return [leaf for leaf in tree_leaves(output) if is_floating(leaf)]


def is_floating(leaf: object) -> bool:
    """Whether it is a tensor that may have a gradient."""
    return isinstance(leaf, Tensor) and leaf.is_floating_point()


def sums_of(outputs: Sequence[Tensor]) -> tuple[tuple[Tensor, Tensor], ...]:
    """See [`LayerCall`]."""
    with torch.no_grad():
        flat = [output.detach().reshape(len(output), -1) if output.ndim else output[None, None] for output in outputs]
        return tuple((one.sum(1, dtype=torch.float64), one.abs().sum(1, dtype=torch.float64)) for one in flat)


def vjp_rows(
    layer: Layer, call: LayerCall, grads: Sequence[Tensor | None], grouping: Grouping
) -> Iterator[tuple[str, RowGradients]]:
    """
    The gradients of each of the layer's parameters, by its name in the layer.

    Args:
        grads: of each floating output; None where it has none.
        grouping: of the sequences.

    Raises:
        LayerError: if the module cannot be called again on one sequence so that it gives what it gave.
    """
    start = _WAY.get(layer.module, 0)
    reasons = []
    for way in range(start, len(_WAYS)):
        try:
            rows = _Vjp(layer, call, grads, grouping).rows(_WAYS[way])
        except Exception as error:
            if should_reduce_batch_size(error):
                raise
            reasons.append(f"{_WAYS[way]}: {one_line(error)[:120]}")
            logger.info("%s %r cannot be differentiated %s", type(layer.module).__name__, layer.name, reasons[-1])
            continue
        _WAY[layer.module] = way
        return ((key, WrittenOut(value)) for key, value in rows.items())
    raise LayerError(
        layer.name,
        f"layer {layer.name!r} of class {type(layer.module).__name__} cannot be differentiated for one sequence alone "
        f"({'; '.join(reasons)})",
    )


class _Vjp:
    def __init__(self, layer: Layer, call: LayerCall, grads: Sequence[Tensor | None], grouping: Grouping) -> None:
        self.layer, self.call, self.number = layer, call, grouping.num_sequences
        self.row_of, self.num_rows = grouping.row_of(), len(grouping.numbers)
        self.params = {key: layer.module.get_parameter(key) for key in layer.parameters}
        self.used = [index for index, gradient in enumerate(grads) if gradient is not None]
        self.grads = [self._by_sequence(gradient) for gradient in grads if gradient is not None]
        self.lead = len(call.first)
        self.is_split = [self._is_split(leaf) for leaf in call.leaves]

    def rows(self, way: str) -> dict[str, Tensor]:
        """By the parameter's name in the layer, (R, *shape)."""
        if not self.used:
            raise ValueError("no output has a gradient")
        rows = {key: summable(param.new_zeros(self.num_rows + 1, *param.shape)) for key, param in self.params.items()}
        ways: dict[str, Callable[[], Iterator[tuple[Tensor, dict[str, Tensor]]]]] = {
            _WAYS[0]: self._batched,
            _WAYS[1]: self._one_by_one,
            _WAYS[2]: self._whole_batch,
        }
        for index, gradients in ways[way]():
            for key, gradient in gradients.items():
                rows[key].index_add_(0, self.row_of[index], gradient.to(rows[key].dtype))
        return {key: value[: self.num_rows] for key, value in rows.items()}  # the last has what is left out

    # ---- ways

    def _batched(self) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        leaves = [
            self._by_sequence(leaf) if split else leaf
            for leaf, split in zip(self.call.leaves, self.is_split, strict=True)
        ]
        split = [leaf for leaf, is_split in zip(leaves, self.is_split, strict=True) if is_split]
        params = {key: param.detach() for key, param in self.params.items()}

        def one(own: list[Tensor], grads: list[Tensor]) -> tuple[dict[str, Tensor], list[Tensor]]:
            own_leaves = iter(own)
            given = [
                next(own_leaves) if is_split else leaf for leaf, is_split in zip(leaves, self.is_split, strict=True)
            ]
            outputs, pull = torch.func.vjp(lambda values: self._outputs(values, given), params)
            return pull(grads)[0], [output.detach() for output in outputs]

        with self.call.as_called():
            for index in self._chunks():
                own, grads = [leaf[index] for leaf in split], [gradient[index] for gradient in self.grads]
                gradients, outputs = torch.func.vmap(one)(own, grads)
                self._check(outputs, index)
                yield index, gradients

    def _one_by_one(self) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        for number in range(self.number):
            index = self.row_of.new_tensor([number])
            given = [
                self._by_sequence(leaf)[number] if split else leaf
                for leaf, split in zip(self.call.leaves, self.is_split, strict=True)
            ]
            with torch.enable_grad(), self.call.as_called():
                params = {key: param.detach().requires_grad_() for key, param in self.params.items()}
                outputs = self._outputs(params, given)
                self._check([output.detach()[None] for output in outputs], index)
                yield index, self._gradients(outputs, params, [gradient[number] for gradient in self.grads])

    def _whole_batch(self) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        with torch.enable_grad(), self.call.as_called():
            params = {key: param.detach().requires_grad_() for key, param in self.params.items()}
            outputs = self._outputs(params, self.call.leaves)
            everything = torch.arange(self.number, device=self.row_of.device)
            self._check([self._by_sequence(output.detach()) for output in outputs], everything)
            for number in range(self.number):
                own = [torch.zeros_like(gradient) for gradient in self.grads]
                for mine, gradient in zip(own, self.grads, strict=True):
                    mine[number] = gradient[number]
                shaped = [mine.view(output.shape) for mine, output in zip(own, outputs, strict=True)]
                yield everything[number : number + 1], self._gradients(outputs, params, shaped)

    # ---- parts

    def _outputs(self, params: dict[str, Tensor], leaves: Sequence[Any]) -> list[Tensor]:
        args, kwargs = self.call.arguments(leaves)
        replacements = {id(param): params[key] for key, param in self.params.items()}
        with replaced_tensors(self.layer.module, replacements):
            outputs = floating(self.layer.module.forward(*args, **kwargs))
        return [outputs[index] for index in self.used]

    def _gradients(self, outputs: list[Tensor], params: dict[str, Tensor], grads: list[Tensor]) -> dict[str, Tensor]:
        values = list(params.values())
        found = torch.autograd.grad(outputs, values, grads, retain_graph=True, allow_unused=True)
        return {
            key: torch.zeros_like(params[key])[None] if gradient is None else gradient[None]
            for key, gradient in zip(params, found, strict=True)
        }

    def _by_sequence(self, tensor: Tensor) -> Tensor:
        """Of shape (B, n, ...): the entries of each sequence along the first axis."""
        if not tensor.ndim or len(tensor) % self.number:
            raise ValueError(f"a tensor of shape {tuple(tensor.shape)} has no equal parts for {self.number} sequences")
        return tensor.reshape(self.number, -1, *tensor.shape[1:])

    def _is_split(self, leaf: object) -> bool:
        """Tensors along the sequences, or along their tokens; others, such as positions, all sequences share."""
        if not isinstance(leaf, Tensor) or not leaf.ndim:
            return False
        by_tokens = self.lead > self.number
        return (by_tokens and len(leaf) == self.lead) or (leaf.ndim > 1 and len(leaf) == self.number)

    def _chunks(self) -> Iterator[Tensor]:
        largest = max(param.numel() for param in self.params.values())
        size = max(1, row_gradients.CHUNK_NUMEL // max(1, largest))
        yield from torch.arange(self.number, device=self.row_of.device).split(size)

    def _check(self, outputs: Sequence[Tensor], index: Tensor) -> None:
        """Whether these sequences alone, again, gave what they gave in the batch."""
        for output, used in zip(outputs, self.used, strict=True):
            then, scale = (self._by_sequence(sums)[index].sum(1) for sums in self.call.sums[used])
            now = output.flatten(1).sum(1, dtype=torch.float64)
            allowed = _ROUNDING.get(output.dtype, _ROUNDING_NARROW) * scale
            if bool(((now - then).abs() > allowed).any()):
                raise ValueError("called again it gives something else, as with dropout or with a mix of sequences")
