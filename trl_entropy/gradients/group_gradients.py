"""X_n and Y_n of (T17): the gradients of each prompt group's entropy and loss terms, by one backward pass each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from jaxtyping import Float
from torch import Tensor, nn
from trl import GRPOConfig

from trl_entropy.engine.parameters import trainable_parameters
from trl_entropy.estimators.entropy_change.cross_prompt import group_entropy_surrogate, group_loss_surrogate
from trl_entropy.estimators.statistics.u_statistic import cross_gram
from trl_entropy.gradients.head_chunks import chunked_scores
from trl_entropy.gradients.memory import halved_on_out_of_memory
from trl_entropy.rollouts.completions import Completions


class GroupRows(NamedTuple):
    """X_n (nats per token) and Y_n (units of the loss), one row a prompt group, in the parameters' dtype."""

    entropy: Float[Tensor, "P D"]
    loss: Float[Tensor, "P D"]


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
    advantages: Float[Tensor, "B *T"],
    args: GRPOConfig,
    policy_entropy: float,
    num_tokens: float,
    num_prompts: int,
    batch_size: int,
) -> GroupRows:
    """
    X_n and Y_n of the prompt groups of `completions`, in the order of their `prompt_index`. Local; leaves no `.grad`.

    Args:
        model: unwrapped, in the mode and with the parameters it is to be differentiated at.
        completions: whole groups; rows of a group need not follow one another.
        advantages: those that the loss gets, `length_normalizer` included.
        args: `temperature` and `max_completion_length` of the loss (T2); G is each group's number of rows.
        policy_entropy, num_tokens, num_prompts: h, sum(T) and P of all groups of the step, over all processes.
        batch_size: completions differentiated at a time; halved as long as memory does not suffice.
    """
    params = list(trainable_parameters(model).values())
    groups = [(completions.prompt_index == n).nonzero().squeeze(1) for n in completions.prompt_index.unique()]

    def surrogates(index: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
        rows = completions.rows(index).trimmed()
        token_entropy, logps = token_scores(model, rows, args.temperature)
        mask, width = rows.loss_mask, rows.completion_mask.shape[1]
        weights = advantages[index] if advantages.ndim == 1 else advantages[index, :width]
        return (
            group_entropy_surrogate(token_entropy, logps, mask, policy_entropy, num_tokens, num_prompts),
            group_loss_surrogate(logps, mask, weights, group_size, args.max_completion_length),
        )

    def all_rows(rows_at_once: int) -> GroupRows:
        shape = len(groups), sum(param.numel() for param in params)
        rows = GroupRows(*(torch.zeros(shape, dtype=params[0].dtype, device=params[0].device) for _ in range(2)))
        for n, group in enumerate(groups):
            for index in group.split(rows_at_once):
                values = surrogates(index, len(group))
                for quantity, value in zip(rows, values, strict=True):
                    _add_gradient(quantity[n], value, params, keep_graph=value is not values[-1])
        return rows

    with torch.enable_grad():
        return halved_on_out_of_memory(all_rows, batch_size)


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
