"""
The rule of a module whose class says nothing, from what it computes on the inputs that it was given: a norm, whose
output is affine in its own vectors, whatever it calls them and whether it multiplies by weight or by 1 + weight; a
linear map; a scaled embedding.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor, nn

from trl_entropy.engine.parameters import parameter_shape, replaced_tensors
from trl_entropy.estimators.rows.row_gradients import RowGradients, WrittenOut
from trl_entropy.gradients.layer_rules import (
    Layer,
    Rule,
    embedding_weight,
    linear_weight,
    summable,
    summed_bias,
    transposed_weight,
)
from trl_entropy.gradients.module_vjp import LayerCall, floating

# Rounding of an output, in units of its dtype and relative to its largest number, by which a rule may differ from it.
_ROUNDING = 64


@dataclass(frozen=True)
class Elementwise:
    """
    y = f(0) + sum_p p u_p for vectors p along the last axis; `kinds` says what u_p is: `"one"` for a bias, `"zero"`
    where it is f(0), as of 1 + weight, `"own"` where f(0) is 0 and u_p is f with p = 1.
    """

    kinds: dict[str, str]


@dataclass(frozen=True)
class Known:
    """Rules by the parameter's name, and a factor by which the gradient of the output is multiplied first."""

    rules: dict[str, Rule]
    scale: float = 1.0


Behaviour = Elementwise | Known
# What each module was seen to be; None if nothing that is known.
_SEEN: WeakKeyDictionary[nn.Module, Behaviour | None] = WeakKeyDictionary()


def behaviour_of(layer: Layer, call: LayerCall) -> Behaviour | None:
    """What the layer computes; looked at once, on the first call whose gradient is asked for."""
    if layer.module not in _SEEN:
        found = None
        if not layer.has_parts and not any(True for _ in layer.module.children()):
            found = _embedding(layer, call) or _linear(layer, call) or _elementwise(layer, call)
        _SEEN[layer.module] = found
    return _SEEN[layer.module]


def gradients_by(
    behaviour: Behaviour, layer: Layer, key: str, inputs: Tensor, grads: Float[Tensor, "R T d"]
) -> RowGradients:
    """
    The gradients of one parameter.

    Args:
        inputs, grads: by row; of a norm, `inputs` are [`direction_of`] its parameter.
    """
    if isinstance(behaviour, Known):
        return behaviour.rules[key](layer.module, inputs, grads * behaviour.scale if behaviour.scale != 1 else grads)
    if behaviour.kinds[key] == "one":
        return summed_bias(layer.module, inputs, grads)
    return WrittenOut((summable(inputs) * summable(grads)).sum(dim=1))


def direction_of(behaviour: Behaviour, layer: Layer, key: str, call: LayerCall) -> Tensor:
    """u_p of an elementwise layer; for others the layer's input."""
    if isinstance(behaviour, Known) or behaviour.kinds[key] == "one":
        return call.first
    output = _output(layer, call, {key: 1.0} if behaviour.kinds[key] == "own" else {})
    assert output is not None, "it had one output when it was looked at"
    return output


# ---- what is looked for


def _elementwise(layer: Layer, call: LayerCall) -> Elementwise | None:
    own = {key: param for key, param in layer.module._parameters.items() if param is not None}
    shapes = {parameter_shape(param) for param in own.values()}
    zero = _output(layer, call, {}) if len(shapes) == 1 and len(min(shapes)) == 1 else None
    if zero is None or zero.shape[-1:] not in shapes:
        return None
    ones = {key: _output(layer, call, {key: 1.0}) - zero for key in own}
    # Not drawn: training's random numbers stay as they are
    ramp = torch.linspace(0.5, 1.7, zero.shape[-1], device=zero.device)
    values = {key: ramp.add(0.3 * number).to(param.dtype) for number, (key, param) in enumerate(own.items())}
    expected = sum((ones[key] * values[key].to(zero.dtype) for key in own), start=zero)
    largest = max(float(one.abs().max()) for one in (zero, *ones.values()))
    allowed = _ROUNDING * torch.finfo(zero.dtype).eps * largest
    if not _within(_output(layer, call, values), expected, allowed):
        return None
    kinds: dict[str, str] = {}
    for key, one in ones.items():
        if _within(one, torch.ones_like(one), allowed):
            kinds[key] = "one"
        elif not zero.any():
            kinds[key] = "own"
        elif _within(one, zero, allowed):
            kinds[key] = "zero"
        else:
            return None
    return Elementwise(kinds)


def _linear(layer: Layer, call: LayerCall) -> Known | None:
    weight, bias = (layer.module._parameters.get(key) for key in ("weight", "bias"))
    inputs, output = call.first, _output(layer, call, None)
    if weight is None or weight.ndim != 2 or not inputs.is_floating_point() or output is None or inputs.ndim < 2:
        return None
    if not set(layer.module._parameters) <= {"weight", "bias"} or not len(weight):
        return None
    x = inputs.to(output.dtype)
    for matrix, rule in ((weight, linear_weight), (weight.mT, transposed_weight)):
        if matrix.shape != (output.shape[-1], inputs.shape[-1]) or inputs.shape[:-1] != output.shape[:-1]:
            continue
        expected = nn.functional.linear(x, matrix.to(x.dtype), None if bias is None else bias.to(x.dtype))
        if _within(output, expected, _ROUNDING * torch.finfo(output.dtype).eps * float(output.abs().max())):
            return Known({"weight": rule, "bias": summed_bias})
    return None


def _embedding(layer: Layer, call: LayerCall) -> Known | None:
    module, ids = layer.module, call.first
    if not isinstance(module, nn.Embedding) or ids.is_floating_point() or list(layer.parameters) != ["weight"]:
        return None
    lines, output = module.weight[ids].detach(), _output(layer, call, None)
    if output is None or output.shape != lines.shape or not lines.any():
        return None
    scale = float((output.double() * lines.double()).sum() / lines.double().square().sum())
    allowed = _ROUNDING * torch.finfo(output.dtype).eps * float(output.abs().max())
    return Known({"weight": embedding_weight}, scale) if _within(output, lines * scale, allowed) else None


def _within(actual: Tensor | None, expected: Tensor, allowed: float) -> bool:
    return actual is not None and bool(((actual - expected).abs() <= allowed).all())


def _output(layer: Layer, call: LayerCall, values: Mapping[str, Tensor | float] | None) -> Tensor | None:
    """What the module gives with these values of its parameters, 0 for those without; None: with its own."""
    replacements = {}
    for key, param in layer.module._parameters.items():
        if param is not None and values is not None:
            value = values.get(key, 0.0)
            if not isinstance(value, Tensor):
                value = torch.full(parameter_shape(param), value, dtype=param.dtype, device=param.device)
            replacements[id(param)] = value
    args, kwargs = call.arguments(call.leaves)
    with call.as_called(), replaced_tensors(layer.module, replacements):
        outputs = floating(layer.module.forward(*args, **kwargs))
    return outputs[0] if len(outputs) == 1 else None
