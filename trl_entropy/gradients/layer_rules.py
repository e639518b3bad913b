"""Per-sequence gradients of the known layers, from their inputs and the gradients of their outputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from trl_entropy.engine.parameters import original_class
from trl_entropy.estimators.rows.row_gradients import Lookups, OuterProducts, RowGradients, WrittenOut

# (a layer of the rule's class, its inputs, the gradients of its outputs) -> the parameter's gradients
Rule = Callable[..., RowGradients]


def _summable(values: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """In the dtype in which sums over tokens are made."""
    return values if values.dtype in (torch.float32, torch.float64) else values.float()


def _linear_weight(module: nn.Linear, inputs: Float[Tensor, "R T i"], grads: Float[Tensor, "R T o"]) -> RowGradients:
    # Under autocast the layer has computed with inputs rounded to the dtype of its outputs.
    return OuterProducts(_summable(inputs.to(grads.dtype)), _summable(grads))


def _embedding_weight(module: nn.Embedding, ids: Int[Tensor, "R T"], grads: Float[Tensor, "R T d"]) -> RowGradients:
    if module.padding_idx is not None:
        grads = grads.where((ids != module.padding_idx)[..., None], 0.0)
    return Lookups(ids, _summable(grads), module.num_embeddings)


def _bias(module: nn.Module, inputs: Tensor, grads: Float[Tensor, "R T d"]) -> RowGradients:
    return WrittenOut(_summable(grads).sum(dim=1))


def _layer_norm_weight(module: nn.LayerNorm, inputs: Float[Tensor, "R T d"], grads: Tensor) -> RowGradients:
    normed = F.layer_norm(_summable(inputs), module.normalized_shape, eps=module.eps)
    return WrittenOut((normed * _summable(grads)).sum(dim=1))


def _rms_norm_weight(module: nn.Module, inputs: Float[Tensor, "R T d"], grads: Tensor) -> RowGradients:
    eps = module.eps if isinstance(module, nn.RMSNorm) else module.variance_epsilon
    normed = F.rms_norm(_summable(inputs), inputs.shape[-1:], eps=eps)
    # Transformers rounds what the weight multiplies to the dtype of the inputs.
    return WrittenOut((_summable(normed.to(inputs.dtype)) * _summable(grads)).sum(dim=1))


# By full name, since a subclass may compute something else; own name of the parameter -> rule.
_RULES: dict[str, dict[str, Rule]] = {
    "torch.nn.modules.linear.Linear": {"weight": _linear_weight, "bias": _bias},
    "torch.nn.modules.sparse.Embedding": {"weight": _embedding_weight},
    "torch.nn.modules.normalization.LayerNorm": {"weight": _layer_norm_weight, "bias": _bias},
    "torch.nn.modules.normalization.RMSNorm": {"weight": _rms_norm_weight},
    "transformers.models.qwen2.modeling_qwen2.Qwen2RMSNorm": {"weight": _rms_norm_weight},
    "transformers.models.llama.modeling_llama.LlamaRMSNorm": {"weight": _rms_norm_weight},
}


@dataclass
class Layer:
    """A module with trainable parameters: their own names, and those they have in the model."""

    name: str
    module: nn.Module
    parameters: dict[str, str]
    rules: dict[str, Rule]
    num_calls: int = 0
    is_reused: bool = False


def known_layers(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> list[Layer]:
    """
    The modules of `model` that hold `parameters`, with the rule of each parameter.

    Raises:
        ValueError: if there are no `parameters`, or no rule covers one of them; names it, its module and the reason.
    """
    names = {id(param): name for name, param in parameters.items()}
    if not names:
        raise ValueError("the model has no trainable parameters")
    layers = []
    for name, module in model.named_modules():
        own = {key: names[id(param)] for key, param in module._parameters.items() if id(param) in names}
        if own:
            kind = original_class(module)
            qualified = f"{kind.__module__}.{kind.__qualname__}"
            rules = _RULES.get(qualified, {})
            if objection := _objection(module, own, rules):
                raise ValueError(
                    f"no per-sequence gradients for {', '.join(map(repr, own.values()))}: module "
                    f"{name or '(the model itself)'!r} of class {qualified} {objection}. Freeze it "
                    "(requires_grad_(False)), or take one backward pass per sequence"
                )
            layers.append(Layer(name, module, own, rules))
    return layers


def _objection(module: nn.Module, own: Mapping[str, str], rules: Mapping[str, Rule]) -> str | None:
    if not own.keys() <= rules.keys():
        return f"is not among those known: {', '.join(sorted(_RULES))}"
    if isinstance(module, nn.Embedding) and (module.scale_grad_by_freq or module.max_norm is not None):
        return "has scale_grad_by_freq or max_norm, which mix the sequences of a batch"
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)) and len(module.normalized_shape) != 1:
        return f"normalises over {len(module.normalized_shape)} dimensions; one is known"
    return None
