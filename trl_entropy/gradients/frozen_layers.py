"""Frozen linear layers in forward mode, without products with tangents that are zero."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from trl_entropy.engine.strict_float32 import patched
from trl_entropy.gradients.adapted_parameters import parameter_adapters


class _FrozenLinear(torch.autograd.Function):
    """
    x W' + b, whose derivative along a direction in which W and b do not move is dx W'.

    torch's own rule also multiplies x with the tangent of W, zeros that it writes out first: three products instead of
    two for the first derivative, nine instead of four for the second. What it adds is zero, so no bit changes.
    """

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return nn.functional.linear(x, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.weight = inputs[1]
        ctx.set_materialize_grads(False)

    @staticmethod
    def jvp(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        assert weight is None and bias is None, "a layer with a direction of its own is not frozen"
        return _FrozenLinear.apply(x, ctx.weight, None)  # its derivative in turn, for the second order


@contextlib.contextmanager
def frozen_layers(model: nn.Module, moving: Collection[str]) -> Iterator[None]:
    """
    Inside, the linear layers of `model` without any of the parameters named `moving` are differentiated along the
    direction of their input alone. Forward mode only.

    A layer that shares its parameter with another counts as moving with it, as in `torch.func.functional_call`.
    """
    moved = {id(param) for name, param in model.named_parameters() if name in moving}
    adapted = {id(wrapper.get_base_layer()) for wrapper in parameter_adapters(model)}
    with contextlib.ExitStack() as undo:
        for layer in model.modules():
            # A subclass, as of bitsandbytes, has a product of its own
            if type(layer) is not nn.Linear or id(layer) in adapted:
                continue
            if not any(id(param) in moved for param in layer.parameters()):
                patched(undo, layer, "forward", _forward_of(layer))
        yield


def _forward_of(layer: nn.Linear) -> Any:
    def forward(x: Float[Tensor, "*shape inner"]) -> Float[Tensor, "*shape outer"]:
        return _FrozenLinear.apply(x, layer.weight, layer.bias)

    return forward
