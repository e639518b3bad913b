"""The layers that hold a model's trainable parameters, and how the gradients of each are split by sequence."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from weakref import WeakSet

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from trl_entropy.engine.parameters import original_class
from trl_entropy.estimators.rows.row_gradients import Lookups, OuterProducts, RowGradients, WrittenOut

# (a layer of the rule's class, its inputs, the gradients of its outputs) -> the parameter's gradients
Rule = Callable[..., RowGradients]
# Modules whose whole subtree is differentiated as one, since their parts hide what each sequence adds; found by trial.
_UNITS: WeakSet[nn.Module] = WeakSet()
_CONTAINERS = (nn.ParameterDict, nn.ParameterList, nn.ModuleDict, nn.ModuleList)


class LayerError(RuntimeError):
    """The gradients that a layer got cannot be split by sequence; `layer` is its name."""

    def __init__(self, layer: str, message: str) -> None:
        super().__init__(message)
        self.layer = layer


class LayerShapeError(LayerError, ValueError):
    """What a layer was called with has no part for each sequence."""


def summable(values: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """In the dtype in which sums over tokens are made."""
    return values if values.dtype in (torch.float32, torch.float64) else values.float()


def linear_weight(module: nn.Module, inputs: Float[Tensor, "R T i"], grads: Float[Tensor, "R T o"]) -> RowGradients:
    """Of a weight (o, i)."""
    # Under autocast the layer has computed with inputs rounded to the dtype of its outputs.
    return OuterProducts(summable(inputs.to(grads.dtype)), summable(grads))


def transposed_weight(
    module: nn.Module, inputs: Float[Tensor, "R T i"], grads: Float[Tensor, "R T o"]
) -> RowGradients:
    """Of a weight (i, o), as GPT-2 has it."""
    return OuterProducts(summable(grads), summable(inputs.to(grads.dtype)))


def embedding_weight(module: nn.Embedding, ids: Int[Tensor, "R T"], grads: Float[Tensor, "R T d"]) -> RowGradients:
    """Of a table; its padding line has no gradient."""
    if module.padding_idx is not None:
        grads = grads.where((ids != module.padding_idx)[..., None], 0.0)
    return Lookups(ids, summable(grads), module.num_embeddings)


def summed_bias(module: nn.Module, inputs: Tensor, grads: Float[Tensor, "R T d"]) -> RowGradients:
    """Of a bias."""
    return WrittenOut(summable(grads).sum(dim=1))


def _layer_norm_weight(module: nn.LayerNorm, inputs: Float[Tensor, "R T d"], grads: Tensor) -> RowGradients:
    normed = F.layer_norm(summable(inputs), module.normalized_shape, eps=module.eps)
    return WrittenOut((normed * summable(grads)).sum(dim=1))


def _rms_norm_weight(module: nn.RMSNorm, inputs: Float[Tensor, "R T d"], grads: Tensor) -> RowGradients:
    normed = F.rms_norm(summable(inputs), inputs.shape[-1:], eps=module.eps)
    return WrittenOut((summable(normed.to(inputs.dtype)) * summable(grads)).sum(dim=1))


# By full name, since a subclass may compute something else; own name of the parameter -> rule. The rule of any other
# module follows from how it behaves.
_RULES: dict[str, dict[str, Rule]] = {
    "torch.nn.modules.linear.Linear": {"weight": linear_weight, "bias": summed_bias},
    "torch.nn.modules.sparse.Embedding": {"weight": embedding_weight},
    "torch.nn.modules.normalization.LayerNorm": {"weight": _layer_norm_weight, "bias": summed_bias},
    "torch.nn.modules.normalization.RMSNorm": {"weight": _rms_norm_weight},
    "transformers.pytorch_utils.Conv1D": {"weight": transposed_weight, "bias": summed_bias},
}


@dataclass
class Layer:
    """
    A module with trainable parameters: their names in it, and those they have in the model.

    Attributes:
        rules: by the parameter's name in the module; empty if they follow from how the module behaves.
        has_parts: whether parameters of modules inside belong to it.
    """

    name: str
    module: nn.Module
    parameters: dict[str, str]
    rules: dict[str, Rule]
    has_parts: bool = False
    num_calls: int = 0
    is_reused: bool = False


def trained_layers(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> list[Layer]:
    """
    The modules of `model` that hold `parameters`: the innermost ones that are called with what a parameter computes.

    Raises:
        ValueError: if there are no `parameters`, or a module of one of them mixes the sequences of a batch; names it,
            its module and the reason.
    """
    names = {id(param): name for name, param in parameters.items()}
    if not names:
        raise ValueError("the model has no trainable parameters")
    layers: dict[int, Layer] = {}
    for name, module, is_unit in _owners(model, names):
        inside = module.named_parameters(remove_duplicate=False) if is_unit else module._parameters.items()
        # A unit may hold a parameter under two names; it is replaced in both places
        keys = {names[id(param)]: key for key, param in reversed(list(inside)) if id(param) in names}
        own = {key: name for name, key in reversed(keys.items())}
        if objection := _objection(module, is_unit):
            raise ValueError(
                f"no per-sequence gradients for {', '.join(map(repr, own.values()))}: module "
                f"{name or '(the model itself)'!r} of class {_class_name(module)} {objection}. Freeze it "
                "(requires_grad_(False)), or take one backward pass per sequence"
            )
        layers[id(module)] = Layer(name, module, own, {} if is_unit else _rules_of(module, own), is_unit)
    return list(layers.values())


def make_unit(model: nn.Module, layer: str) -> bool:
    """
    From now on the module around `layer`, and those around the layers of the same place in other blocks, are split by
    sequence as wholes. False if that would be the model itself.
    """
    modules = dict(model.named_modules())
    pattern = _place(layer)
    around = {_around(name, modules) for name in modules if _place(name) == pattern}
    if "" in around:
        return False
    _UNITS.update(modules[name] for name in around)
    return True


def _place(name: str) -> tuple[str, ...]:
    return tuple("*" if part.isdigit() else part for part in name.split("."))


def _around(name: str, modules: Mapping[str, nn.Module]) -> str:
    parent = name.rpartition(".")[0]
    while parent and isinstance(modules[parent], _CONTAINERS):
        parent = parent.rpartition(".")[0]
    return parent


def _owners(model: nn.Module, names: Mapping[int, str]) -> Iterator[tuple[str, nn.Module, bool]]:
    """The module that each parameter belongs to, its name, and whether all parameters inside belong to it."""
    modules = dict(model.named_modules())
    inside_unit: list[str] = []
    for name, module in modules.items():
        if any(name.startswith(f"{unit}.") for unit in inside_unit[-1:]):
            continue
        own = any(id(param) in names for param in module._parameters.values())
        if module in _UNITS or _is_whole(module, names):
            if any(id(param) in names for param in module.parameters()):
                inside_unit.append(name)
                yield name, module, True
        elif any(id(param) in names for part in _containers(module) for param in part.parameters()):
            inside_unit.append(name)
            yield name, module, True
        elif own:
            yield name, module, False


def _containers(module: nn.Module) -> Iterator[nn.Module]:
    """Those of parameters alone, which are not called: the module around them computes with what they hold."""
    if not isinstance(module, _CONTAINERS):
        yield from (part for part in module.children() if isinstance(part, (nn.ParameterDict, nn.ParameterList)))


def _is_whole(module: nn.Module, names: Mapping[int, str]) -> bool:
    """Whether it is a layer of peft that computes with weights without calling the modules that hold them."""
    if not (hasattr(module, "adapter_layer_names") and hasattr(module, "base_layer")):
        return False
    holders = [part for part in module.modules() if any(id(param) in names for param in part._parameters.values())]
    uncalled = hasattr(module, "parameter_name")  # peft's ParamWrapper, for parameters of experts
    return bool(holders) and (uncalled or any(original_class(part) is not nn.Linear for part in holders))


def _rules_of(module: nn.Module, own: Mapping[str, str]) -> dict[str, Rule]:
    rules = _RULES.get(_class_name(module), {})
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)) and len(module.normalized_shape) != 1:
        return {}
    return rules if own.keys() <= rules.keys() else {}


def _class_name(module: nn.Module) -> str:
    kind = original_class(module)
    return f"{kind.__module__}.{kind.__qualname__}"


def _objection(module: nn.Module, is_unit: bool) -> str | None:
    for part in module.modules() if is_unit else [module]:
        if isinstance(part, nn.Embedding) and (part.scale_grad_by_freq or part.max_norm is not None):
            return "has scale_grad_by_freq or max_norm, which mix the sequences of a batch"
        if isinstance(part, nn.modules.batchnorm._NormBase):
            return f"has a {type(part).__name__}, whose statistics mix the sequences of a batch"
    return None
