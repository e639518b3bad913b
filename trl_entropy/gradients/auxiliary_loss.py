"""The loss that balances the load of a mixture's experts: TRL's coefficient of it, and its derivative (T9)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from trl_entropy.engine.parameters import evaluation_mode
from trl_entropy.gradients.inputs import base_model, model_inputs
from trl_entropy.gradients.scores import Params, differentiable_kernels, without_input_grad_hooks
from trl_entropy.rollouts.completions import Completions

if TYPE_CHECKING:
    from trl import GRPOConfig


def auxiliary_coefficient(args: GRPOConfig, model: nn.Module) -> float:
    """What TRL multiplies the balancing loss of a micro-batch by; 0 if it adds none."""
    config = base_model(model).config.get_text_config()
    if not hasattr(config, "output_router_logits"):
        return 0.0
    given = args.router_aux_loss_coef
    return float(getattr(config, "router_aux_loss_coef", 0.0) if given is None else given)


def auxiliary_slope(
    model: nn.Module, completions: Completions, micro_batch: int, params: Params, direction: Params
) -> Float[Tensor, ""]:
    """
    The derivative along `direction` of the balancing loss, mean over the micro-batches of a step, in forward mode.

    The loss is a product of two averages over the tokens of a micro-batch, so that it is computed for each of
    training's micro-batches as a whole. Local. Cost: about four forward passes of the step's completions, without
    their logits.

    Args:
        model: unwrapped, with the experts of a mixture.
        completions: of the step, in training's order.
        micro_batch: rows of a micro-batch.
        params: trainable parameters to differentiate at.
        direction: change of them, by the same names.

    Returns:
        Units of the loss, float64.
    """
    point = {name: value.detach() for name, value in params.items()}
    tangents = {name: direction[name] for name in point}
    rows = torch.arange(len(completions), device=completions.input_ids.device).split(micro_batch)
    slopes = []
    with evaluation_mode(model), without_input_grad_hooks(model), differentiable_kernels(model, 1, point):
        for some in rows:
            inputs = model_inputs(model, completions.rows(some).trimmed())
            inputs |= {"output_router_logits": True, "logits_to_keep": 1}
            _, slope = torch.func.jvp(lambda at: _auxiliary_loss(model, at, inputs), (point,), (tangents,))  # noqa: B023
            slopes.append(slope.double())
    return torch.stack(slopes).mean()


def _auxiliary_loss(model: nn.Module, params: dict[str, Tensor], inputs: dict[str, Any]) -> Float[Tensor, ""]:
    return torch.func.functional_call(model, params, (), inputs, strict=False).aux_loss
