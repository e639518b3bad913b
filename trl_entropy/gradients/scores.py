"""Scores of given completions, and their exact directional derivatives along a change of the parameters."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from trl_entropy.engine.parameters import evaluation_mode
from trl_entropy.gradients.adapted_parameters import adapted_parameters
from trl_entropy.gradients.frozen_layers import frozen_layers
from trl_entropy.gradients.head_chunks import chunked_scores
from trl_entropy.gradients.inputs import eager_experts
from trl_entropy.gradients.memory import in_batches
from trl_entropy.gradients.moving_parameters import MovingParameters
from trl_entropy.gradients.router_choices import RouterChoices
from trl_entropy.gradients.shared_prompts import SharedPrompts
from trl_entropy.rollouts.completions import Completions

INPUT_GRAD_HOOK = "make_inputs_require_grads"

Params = Mapping[str, Float[Tensor, "..."]]


@dataclass(frozen=True)
class TokenScores:
    """
    Entropy of the next-token distribution and log-probability of the token drawn, per completion token, nats.

    `entropy[0]` and `logps[0]` are the values, `entropy[1]` and `logps[1]` their first derivatives along the direction
    that was asked for, which for a probe is the step's update, and `entropy[2]`, `logps[2]` the second, where they
    were taken: the tuples are as long as what was asked for.
    `experts` are the sets that the L routers of a mixture chose where it read each token, ascending; None if the model
    is dense or its routers do not say.
    """

    entropy: tuple[Float[Tensor, "B T"], ...]
    logps: tuple[Float[Tensor, "B T"], ...]
    experts: Int[Tensor, "B T L k"] | None = None


def score(
    model: nn.Module,
    completions: Completions,
    temperature: float,
    batch_size: int | None,
    params: Params | None = None,
    direction: Params | None = None,
    order: int = 0,
) -> TokenScores:
    """
    Score completions and differentiate the scores along `direction`, by forward mode: exact, no graph, no gradient.

    Local: no communication. Cost of order 0, 1, 2: about 1, 4 and 13 forward passes; the matrix products of 1, 3 and
    9, and with LoRA of 1, 2 and 4.5.

    Args:
        model: unwrapped; its mode is restored. In evaluation mode meanwhile: no dropout, no checkpointing.
        completions: what to score.
        temperature: sampling temperature that the logits are divided by.
        batch_size: completions at a time, at most; None: as many as memory allows (see `in_batches`).
        params: trainable parameters to score with; None for the model's own.
        direction: change of them, by the same names; needed for an order above 0.
        order: derivatives to take, 0 to 2.

    Returns:
        Scores with `order + 1` entries each, zero where `loss_mask` is.
    """
    if order and direction is None:
        raise ValueError(f"order is {order}; derivatives need a direction")
    moving = MovingParameters.of(model, params, direction, order)
    longest_first = completions.widths.argsort(descending=True, stable=True)

    choices = RouterChoices(model)

    def score_all(rows_at_once: int) -> tuple[list[Tensor], Tensor | None]:
        parts, experts = [], []
        for rows in longest_first.split(rows_at_once):
            chunk = completions.rows(rows).trimmed()
            parts.append(moving.derivatives(_scorer(model, chunk, temperature)))
            experts.append(choices.take(len(chunk), chunk.completion_mask.shape[1]))
        mask, number = completions.loss_mask.bool(), 2 * (order + 1)
        known = [one for one in experts if one is not None]
        chosen = _in_order(known, mask, longest_first) if known and len(known) == len(experts) else None
        return [_join([part[i] for part in parts], mask, longest_first) for i in range(number)], chosen

    with (
        evaluation_mode(model),
        without_input_grad_hooks(model),
        differentiable_kernels(model, order, moving.names),
        moving.in_model(),
        choices.watch(),
    ):
        results, chosen = in_batches(score_all, model, completions, batch_size, order)
    return TokenScores(tuple(results[0::2]), tuple(results[1::2]), chosen)


def _scorer(model: nn.Module, chunk: Completions, temperature: float) -> Callable[[dict], tuple[Tensor, Tensor]]:
    """The function from parameters to (entropy, log-probabilities) of a chunk."""
    shared = SharedPrompts.of(model, chunk)

    def scores(params: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        def call(inputs: dict[str, Any]) -> Any:
            return torch.func.functional_call(model, params, (), inputs, strict=False)

        if shared is not None:
            return shared.scores(call, temperature)
        return chunked_scores(model, chunk, temperature, recompute=False, call=call)

    return scores


def _join(parts: list[Float[Tensor, "..."]], mask: Bool[Tensor, "B T"], order: Int[Tensor, " B"]) -> Tensor:
    """Rows of all chunks back in their own order, as wide as the mask, zero where the policy drew no token."""
    return _in_order(parts, mask, order).where(mask, 0.0)


def _in_order(parts: list[Tensor], mask: Bool[Tensor, "B T"], order: Int[Tensor, " B"]) -> Tensor:
    """Rows of all chunks back in their own order, as wide as the mask."""
    missing = [mask.shape[1] - part.shape[1] for part in parts]
    rows = torch.cat(
        [
            nn.functional.pad(part, (0, 0) * (part.ndim - 2) + (0, gap))
            for part, gap in zip(parts, missing, strict=True)
        ]
    )
    return torch.empty_like(rows).index_copy_(0, order, rows)


@contextlib.contextmanager
def differentiable_kernels(model: nn.Module, order: int, params: Collection[str]) -> Iterator[None]:
    """
    Kernels that have the derivatives asked for: fused attention and fused experts have no forward mode, and with grad
    mode off some forward derivatives (SiLU's) are kernels without a derivative of their own. No parameter requires a
    gradient.
    """
    with contextlib.ExitStack() as kernels:
        kernels.enter_context(torch.set_grad_enabled(order > 1))
        if order:
            kernels.enter_context(sdpa_kernel(SDPBackend.MATH))
            kernels.enter_context(eager_experts(model))
            kernels.enter_context(adapted_parameters(model))
            kernels.enter_context(frozen_layers(model, params))
        yield


@contextlib.contextmanager
def without_input_grad_hooks(model: nn.Module) -> Iterator[None]:
    """For checkpointing transformers hooks `requires_grad_` onto the embeddings' output, which torch.func forbids."""
    hooked = [
        (module, key, hook)
        for module in model.modules()
        for key, hook in module._forward_hooks.items()
        if getattr(hook, "__name__", "") == INPUT_GRAD_HOOK
    ]
    for module, key, _ in hooked:
        del module._forward_hooks[key]
    try:
        yield
    finally:
        for module, key, hook in hooked:
            module._forward_hooks[key] = hook
