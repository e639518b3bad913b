"""Each sequence's gradient, from hooks on the layers, reduced to what is asked for while the backward pass runs.

    norms, dots = SquaredNorms(num_sequences), DotProducts(num_sequences, [direction])
    with SequenceGradients(model, norms, dots) as collector:
        loss = ...                                # a sum over the sequences of the micro-batch, by `model`
        with collector.batch(torch.arange(8)):    # the number of each sequence, or that of its group
            loss.backward()                       # of training, or torch.autograd.grad
    norms.values, dots.values

The gradient of sequence b is that of its share of the loss: what the parameters would get with the other sequences'
shares left out. It is exact if a sequence's share depends on the parameters through row b of each layer alone.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.utils._pytree import tree_flatten, tree_map

from trl_entropy.engine.parameters import parameter_shape, trainable_parameters
from trl_entropy.estimators.rows.row_gradients import Grouping, OuterProducts, RowGradients, Sum, WrittenOut
from trl_entropy.estimators.rows.row_sums import Consumer, DotProducts, Rows, SquaredNorms
from trl_entropy.gradients.behaviour import behaviour_of, direction_of, gradients_by
from trl_entropy.gradients.layer_rules import Layer, LayerError, LayerShapeError, trained_layers
from trl_entropy.gradients.module_vjp import LayerCall, floating, is_floating, sums_of, vjp_rows

__all__ = ["Consumer", "DotProducts", "RowGradients", "Rows", "SequenceGradients", "SquaredNorms"]


class SequenceGradients:
    """
    Hooks on every layer with trainable parameters that hand each sequence's gradients to consumers.

    A sequence is a row of the first dimension of the layers' inputs, or so many tokens one after the other. Linear
    layers (LoRA's A and B are such), embeddings and norms have rules of their own, found by their class or by what
    they compute; any other module is differentiated alone, once more for each sequence (`module_vjp`). Tied weights;
    layers used more than once in a forward; both kinds of gradient checkpointing; autocast and bf16, summed in
    float32. Forwards without gradient (generation) are ignored. Whether a module hides what each sequence adds cannot
    be seen from its class: `prove_rows` tries it, and makes such a module part of a larger one.

    Hooks are there from `__enter__` to `__exit__`: run forward *and* backward between. They change no number:
    training stays bit-identical. The input of each layer lives as long as the graph does, where checkpointing does
    not recompute it. Local to the process: no communication.

    Args:
        model: unwrapped: the module inside DDP or DeepSpeed. Its parameters may be partitioned (ZeRO-3).
        consumers: what to do with the gradients.
        weight_gradients: `False`, for extra passes: inside, no parameter requires a gradient, so that autograd spends
            nothing on their sum; call `loss.backward()`, which then leaves no `.grad` on any of them. LoRA with
            reentrant checkpointing needs `model.enable_input_require_grads()`, as in training.

    Raises:
        ValueError: by name, if a trainable parameter belongs to a module that mixes the sequences of a batch.
    """

    def __init__(self, model: nn.Module, *consumers: Consumer, weight_gradients: bool = True) -> None:
        self.model, self.weight_gradients = model, weight_gradients
        parameters = trainable_parameters(model)
        self.shapes = {name: parameter_shape(param) for name, param in parameters.items()}
        self._layers = trained_layers(model, parameters)
        self._num_uses = Counter(name for layer in self._layers for name in layer.parameters.values())
        self._in_forward = self._in_rule = False
        self._batch: _Batch | None = None
        self._undo = contextlib.ExitStack()
        self._device = next(iter(parameters.values())).device
        self.consume(*consumers)

    def consume(self, *consumers: Consumer) -> None:
        """Hand gradients to these from now on, in place of those before; between two batches."""
        self.consumers = consumers
        for consumer in consumers:
            consumer.bind(self.shapes, self._device)

    def __enter__(self) -> SequenceGradients:
        # An input of the graph nodes that keep a layer's inputs, so that autograd makes such nodes
        self._anchor = torch.zeros((), requires_grad=True)
        register = [
            self.model.register_forward_pre_hook(self._start_forward),
            self.model.register_forward_hook(self._end_forward, always_call=True),
            *(layer.module.register_forward_hook(self._on_forward(layer), with_kwargs=True) for layer in self._layers),
        ]
        for handle in register:
            self._undo.callback(handle.remove)
        if not self.weight_gradients:
            shared = (layer.module.get_parameter(key) for layer in self._layers for key in layer.parameters)
            for param in dict.fromkeys(shared):
                self._undo.callback(param.requires_grad_, True)
                param.requires_grad_(False)
        return self

    def __exit__(self, *exception: object) -> None:
        self._undo.close()

    @contextlib.contextmanager
    def batch(self, rows: Int[Tensor, " B"]) -> Iterator[None]:
        """
        Takes the gradients of the one backward pass inside, of one forward pass; passes outside are ignored.

        Args:
            rows: number of each sequence's row, from 0, in the consumers. Sequences with the same number are summed
                before anything is squared; -1 leaves a sequence out.

        Raises:
            LayerShapeError: if a layer saw another number of sequences than `rows` has.
            LayerError: if a layer did not get one gradient for each of its calls, so that a sum would be wrong. Do
                not use what the consumers hold after an exception.
        """
        grouping = Grouping.of(rows)
        for consumer in self.consumers:
            consumer.begin(grouping.numbers)
        self._batch = batch = _Batch(grouping.on(self._device))
        try:
            yield
        finally:
            self._batch = None
        self._check_complete(batch)
        with _exact(self._device):
            for name, parts in batch.waiting.items():
                self._hand_out(name, Sum(parts) if len(parts) > 1 else parts[0], batch)

    def _check_complete(self, batch: _Batch) -> None:
        """Whether each layer got one gradient for each of its calls in the last forward."""
        for layer in self._layers:
            count, expected = batch.num_gradients[layer.name], max(1, layer.num_calls)
            if count != expected:
                raise LayerError(
                    layer.name,
                    f"layer {layer.name!r} got {count} gradients instead of {expected}: run the forward inside `with "
                    "SequenceGradients(...)`; score with plain logits (TRL's fused_lm_head=True uses the head without "
                    "calling it); freeze layers that the loss leaves out; change no layer's output in place",
                )

    # ---- hooks

    def _start_forward(self, module: nn.Module, args: tuple) -> None:
        self._in_forward = True
        for layer in self._layers:
            layer.num_calls = 0

    def _end_forward(self, module: nn.Module, args: tuple, output: object) -> None:
        self._in_forward = False

    def _on_forward(self, layer: Layer) -> Callable:
        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: object) -> object:
            if self._in_rule:
                return None
            # Calls without gradient count too, recomputation does not: reentrant checkpointing has both.
            layer.num_calls += self._in_forward
            layer.is_reused |= layer.num_calls > 1
            if not torch.is_grad_enabled():
                return None
            outputs = floating(output)
            if len(outputs) > 1:
                # One may be made from another inside the module, and its gradient would count in both
                output = tree_map(lambda leaf: leaf.view_as(leaf) if is_floating(leaf) else leaf, output)
                outputs = floating(output)
            if not self.weight_gradients:
                for one in outputs:  # where the graph begins, now that no parameter is a leaf of it
                    if not one.requires_grad:
                        one.requires_grad_()
            if any(one.requires_grad for one in outputs):
                self._keep(layer, args, kwargs, outputs)
            return output if len(outputs) > 1 else None

        return hook

    def _keep(self, layer: Layer, args: tuple, kwargs: dict[str, Any], outputs: list[Tensor]) -> None:
        """Keeps what a layer was called with until the gradient of what it gave is there."""
        first = args[0] if args else next(iter(kwargs.values()))
        leaves, spec = tree_flatten(((first,), {}) if layer.rules else (args, kwargs))
        places = [index for index, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        kept = _Keep.apply(self._anchor, *(leaves[index].detach() for index in places))
        others = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        sums, autocast = ((), None) if layer.rules else (sums_of(outputs), _autocast_dtype(outputs[0].device))

        def on_gradients(grads: Sequence[Tensor | None]) -> None:
            if self._batch is None:
                return
            filled = list(others)
            for index, tensor in zip(places, kept.grad_fn.saved_tensors, strict=True):
                filled[index] = tensor
            self._on_gradients(layer, LayerCall(tuple(filled), spec, sums, autocast), list(grads), self._batch)

        with_gradient = [one for one in outputs if one.requires_grad]
        if len(outputs) == 1:
            outputs[0].register_hook(lambda gradient: on_gradients([gradient]))
        else:
            missing = [one.requires_grad for one in outputs]

            def together(grads: Sequence[Tensor | None]) -> None:
                given = iter(grads)
                on_gradients([next(given) if there else None for there in missing])

            torch.autograd.graph.register_multi_grad_hook(with_gradient, together, mode="all")

    def _on_gradients(self, layer: Layer, call: LayerCall, grads: list[Tensor | None], batch: _Batch) -> None:
        batch.num_gradients[layer.name] += 1
        first = next((one for one in grads if one is not None), None)
        if first is None:
            return
        num_sequences = batch.grouping.num_sequences
        by_tokens = len(first) != num_sequences
        if len(call.first) != len(first) or len(first) % num_sequences or (by_tokens and first.ndim > 2):
            raise LayerShapeError(
                layer.name,
                f"layer {layer.name!r} has inputs of shape {tuple(call.first.shape)} and outputs of "
                f"{tuple(first.shape)}, but the batch has {num_sequences} sequences: their first dimension must be "
                "the sequences, or the tokens of one sequence after the other",
            )
        with _exact(first.device), self._computing():
            for own_name, gradients in self._rows(layer, call, grads, batch.grouping):
                name = layer.parameters[own_name]
                if layer.is_reused or self._num_uses[name] > 1:
                    batch.keep(name, gradients)
                else:
                    self._hand_out(name, gradients, batch)

    def _rows(
        self, layer: Layer, call: LayerCall, grads: list[Tensor | None], grouping: Grouping
    ) -> Iterator[tuple[str, RowGradients]]:
        behaviour = None if layer.rules else behaviour_of(layer, call)
        if not layer.rules and behaviour is None:
            yield from vjp_rows(layer, call, grads, grouping)
            return
        (gradient,) = grads
        assert gradient is not None, "the only output has one"
        for own_name in layer.parameters:
            inputs = call.first if behaviour is None else direction_of(behaviour, layer, own_name, call)
            by_row = grouping.by_row(inputs, gradient)
            if behaviour is None:
                yield own_name, layer.rules[own_name](layer.module, *by_row)
            else:
                yield own_name, gradients_by(behaviour, layer, own_name, *by_row)

    @contextlib.contextmanager
    def _computing(self) -> Iterator[None]:
        """The layers that a rule calls again are no calls of the model's."""
        self._in_rule = True
        try:
            yield
        finally:
            self._in_rule = False

    def _hand_out(self, name: str, gradients: RowGradients, batch: _Batch) -> None:
        if name in batch.done:
            raise RuntimeError(
                f"a second gradient came for {name!r} in one batch: call the model once and go backward once in each "
                "batch, and call the whole model rather than its parts if it uses a layer more than once"
            )
        batch.done.add(name)
        for consumer in self.consumers:
            consumer.add(name, gradients, batch.grouping.numbers)


class _Keep(torch.autograd.Function):
    """A node of the graph that keeps tensors as autograd keeps its own: checkpointing drops and recomputes it.

    No gradient flows through the node. It lives as long as its output: torch 2.11 lets go of what a node has saved as
    soon as only the node itself is referred to.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, anchor: Tensor, *kept: Tensor) -> Tensor:
        ctx.save_for_backward(*kept)
        return anchor.clone()


def _autocast_dtype(device: torch.device) -> torch.dtype | None:
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None


def _exact(device: torch.device) -> AbstractContextManager[object]:
    """No graph is built, even under `create_graph=True`, and nothing is rounded to bf16, even under autocast."""
    if torch.is_autocast_enabled(device.type):
        return _without_graph_and_autocast(device.type)
    return torch.no_grad() if torch.is_grad_enabled() else contextlib.nullcontext()


@contextlib.contextmanager
def _without_graph_and_autocast(device_type: str) -> Iterator[None]:
    with torch.no_grad(), torch.autocast(device_type, enabled=False):
        yield


@dataclass
class _Batch:
    """The gradients that one backward pass has brought so far."""

    grouping: Grouping
    num_gradients: Counter[str] = field(default_factory=Counter)
    done: set[str] = field(default_factory=set)
    waiting: dict[str, list[RowGradients]] = field(default_factory=dict)

    def keep(self, name: str, gradients: RowGradients) -> None:
        """Keeps a part until all parts of its parameter are there: as factors or written out, whichever is smaller."""
        if isinstance(gradients, OuterProducts) and gradients.is_larger_than_whole:
            gradients = WrittenOut(gradients.whole)
        parts = self.waiting.setdefault(name, [])
        parts.append(gradients)
        # A head that is applied to one chunk after the other: together their factors may be larger than the whole
        if len(parts) > 1 and sum(part.num_kept for part in parts) > gradients.num_rows * gradients.shape.numel():
            parts[:] = [WrittenOut(Sum(parts).whole)]
