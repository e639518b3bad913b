"""X_n and Y_n of (T17): the gradients of each prompt group's entropy and loss terms, by one backward pass each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from jaxtyping import Float
from torch import Tensor, nn

from trl_entropy.engine.parameters import trainable_parameters
from trl_entropy.estimators.entropy_change.cross_prompt import group_entropy_surrogate
from trl_entropy.estimators.statistics.u_statistic import cross_gram
from trl_entropy.gradients.head_chunks import chunked_scores
from trl_entropy.gradients.loss_coefficients import LossCoefficients
from trl_entropy.gradients.memory import in_batches
from trl_entropy.rollouts.completions import Completions


class GroupRows(NamedTuple):
    """
    X_n (nats per token) and Y_n (units of the loss), one row a prompt group, in the parameters' dtype, and the sum of
    the Y_n of all groups, those included that have no row.
    """

    entropy: Float[Tensor, "P D"]
    loss: Float[Tensor, "P D"]
    loss_total: Float[Tensor, " D"]


def token_scores(
    model: nn.Module, completions: Completions, temperature: float
) -> tuple[Float[Tensor, "B T"], Float[Tensor, "B T"]]:
    """
    Entropy and log-probability of every completion token, nats, with their graph. Go backward while the model is as it
    is now: logits are made again then, if they are many.
    """
    return chunked_scores(model, completions, temperature, recompute=True)


def group_rows(
    model: nn.Module,
    completions: Completions,
    coefficients: LossCoefficients,
    temperature: float,
    policy_entropy: float,
    num_tokens: float,
    num_prompts: int,
    batch_size: int | None,
    weights: Float[Tensor, "B T"] | None = None,
    num_kept: int | None = None,
) -> GroupRows:
    """
    X_n and Y_n of the prompt groups of `completions`, in the order of their `prompt_index`. Local; leaves no `.grad`.

    Args:
        model: unwrapped, in the mode and with the parameters it is to be differentiated at.
        completions: whole groups; rows of a group need not follow one another.
        coefficients: how the step's loss depends on their scores, times P of the step.
        temperature: sampling temperature.
        policy_entropy, num_tokens, num_prompts: h, the sum of all weights, and P, of all groups whose entropy is
            meant, over all processes.
        batch_size: completions differentiated at a time, at most; None: as many as memory allows.
        weights: of (T6), if another sampler drew the completions.
        num_kept: only the first so many groups have rows; None: all.
    """
    params = list(trainable_parameters(model).values())
    groups = [(completions.prompt_index == n).nonzero().squeeze(1) for n in completions.prompt_index.unique()]

    num_kept = len(groups) if num_kept is None else min(num_kept, len(groups))

    def surrogates(index: Tensor) -> tuple[Tensor, Tensor]:
        rows = completions.rows(index).trimmed()
        scores, mask = token_scores(model, rows, temperature), rows.loss_mask
        own = None if weights is None else weights[index, : mask.shape[1]]
        return (
            group_entropy_surrogate(*scores, mask, policy_entropy, num_tokens, num_prompts, own),
            coefficients.surrogate(*scores, mask, index),
        )

    def all_rows(rows_at_once: int) -> GroupRows:
        size = sum(param.numel() for param in params)
        entropy, loss, total = (params[0].new_zeros(*shape, size) for shape in ((num_kept,), (num_kept,), ()))
        for n, group in enumerate(groups):
            for index in group.split(rows_at_once):
                of_entropy, of_loss = surrogates(index)
                if n < num_kept:
                    _add_gradient(entropy[n], of_entropy, params, keep_graph=True)
                _add_gradient(loss[n] if n < num_kept else total, of_loss, params, keep_graph=False)
        return GroupRows(entropy, loss, total + loss.sum(0))

    with torch.enable_grad():
        return in_batches(all_rows, model, completions, batch_size, backward="twice")


def flat(tensors: Mapping[str, Tensor], names: Iterable[str]) -> Float[Tensor, " D"]:
    """One vector in the order of `names`."""
    return torch.cat([tensors[name].flatten() for name in names])


def gram_of_all_rows(
    x: Float[Tensor, "N D"],
    y: Float[Tensor, "N D"],
    accelerator: Accelerator,
    product: Callable[[Tensor, Tensor], Float[Tensor, "N N"]] = cross_gram,
) -> Float[Tensor, "M M"]:
    """`product` of the x and y of all ranks, in rank order; y is broadcast, one rank's at a time. Collective."""
    columns = []
    for rank in range(accelerator.num_processes):
        of_rank = y if rank == accelerator.process_index else torch.empty_like(y)
        columns.append(product(x, broadcast(of_rank, rank)))
    return accelerator.gather(torch.cat(columns, dim=1))


def _add_gradient(row: Float[Tensor, " D"], value: Tensor, params: list[nn.Parameter], keep_graph: bool) -> None:
    """Add the gradient of `value`, flat, to `row`; parameters that it does not depend on have none."""
    gradients = torch.autograd.grad(value, params, retain_graph=keep_graph, allow_unused=True)
    parts = row.split([param.numel() for param in params])
    for part, gradient in zip(parts, gradients, strict=True):
        if gradient is not None:
            part += gradient.flatten()
