"""Extra passes over given completions: grad h as a whole, and each completion's own gradient for a consumer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from trl_entropy.engine.parameters import trainable_parameters
from trl_entropy.estimators.entropy_change.surrogate import surrogate_terms
from trl_entropy.estimators.rows.row_sums import Consumer, DotProducts
from trl_entropy.gradients.group_gradients import token_scores
from trl_entropy.gradients.loss_coefficients import LossCoefficients
from trl_entropy.gradients.memory import in_batches
from trl_entropy.gradients.scores import Params
from trl_entropy.gradients.sequence_gradients import SequenceGradients
from trl_entropy.rollouts.completions import Completions

AnyConsumer = TypeVar("AnyConsumer", bound=Consumer)
# (token entropies, log-probabilities, the completions that they are of, their numbers) -> what is differentiated
Value = Callable[[Tensor, Tensor, Completions, Int[Tensor, " n"]], Float[Tensor, ""]]


def entropy_gradient(
    model: nn.Module,
    completions: Completions,
    temperature: float,
    batch_size: int | None,
    policy_entropy: float,
    num_tokens: float,
    weights: Float[Tensor, "B T"] | None = None,
) -> dict[str, Float[Tensor, "..."]]:
    """
    (T8): these completions' share of grad h, by parameter name; shares add over processes. Local; leaves no `.grad`.

    Args:
        model: unwrapped, in evaluation mode, with the parameters it is to be differentiated at.
        completions: independent of the update.
        temperature: sampling temperature.
        batch_size: completions differentiated at a time, at most; None: as many as memory allows.
        policy_entropy, num_tokens: h and the sum of all weights over E, all processes together.
        weights: of (T6), if another sampler drew E.
    """
    return gradient_of(
        model, completions, entropy_shares(policy_entropy, num_tokens, weights), temperature, batch_size
    )


def gradient_of(
    model: nn.Module, completions: Completions, value: Value, temperature: float, batch_size: int | None
) -> dict[str, Float[Tensor, "..."]]:
    """
    The gradient of a value that is a sum over completions, by parameter name. Local; leaves no `.grad`.

    Args:
        model: unwrapped, in evaluation mode, with the parameters it is to be differentiated at.
        completions: if there are none, the gradient is zeros.
        value: of some of them; the sum over all is differentiated.
        temperature, batch_size: as in [`entropy_gradient`].
    """
    return gradients_of(model, completions, [value], temperature, batch_size)[0]


def gradients_of(
    model: nn.Module, completions: Completions, values: Sequence[Value], temperature: float, batch_size: int | None
) -> list[dict[str, Float[Tensor, "..."]]]:
    """As [`gradient_of`], for several values: one forward pass, and one backward pass for each value."""
    params = trainable_parameters(model)

    def summed(rows_at_once: int) -> list[dict[str, Tensor]]:
        totals = [{name: torch.zeros_like(param) for name, param in params.items()} for _ in values]
        for index, rows in _chunks(completions, rows_at_once):
            scores = token_scores(model, rows, temperature)
            for i, (total, value) in enumerate(zip(totals, values, strict=True), start=1):
                share, keep = value(*scores, rows, index), i < len(values)
                gradients = torch.autograd.grad(share, list(params.values()), retain_graph=keep, allow_unused=True)
                for name, gradient in zip(params, gradients, strict=True):
                    if gradient is not None:
                        total[name] += gradient
        return totals

    with torch.enable_grad():
        return in_batches(summed, model, completions, batch_size, backward="entropies")


def consumed(
    model: nn.Module,
    completions: Completions,
    value: Value,
    make_consumer: Callable[[], AnyConsumer],
    temperature: float,
    batch_size: int | None,
) -> AnyConsumer:
    """
    The consumer after one forward and backward pass, rows numbered as `completions` are. Local; leaves no `.grad`.

    Args:
        model: unwrapped, in evaluation mode, with the parameters it is to be differentiated at.
        completions: their gradients are taken.
        value: a sum over completions; completion i's row is the gradient of its share.
        make_consumer: called again when memory runs out and the pass begins anew with half as many at a time.
        temperature, batch_size: as in [`entropy_gradient`].
    """

    def one_pass(rows_at_once: int) -> AnyConsumer:
        consumer = make_consumer()
        with SequenceGradients(model, consumer, weight_gradients=False) as collector:
            for index, rows in _chunks(completions, rows_at_once):
                share = value(*token_scores(model, rows, temperature), rows, index)
                with collector.batch(index.cpu()):
                    share.backward()
        return consumer

    with torch.enable_grad():
        return in_batches(one_pass, model, completions, batch_size, backward="logps")


def weighted_logps(coefficients: Float[Tensor, "B T"]) -> Value:
    """sum_ik c_ik S_ik, for [`consumed`]: with -alpha_ik of (T9) its gradients are the g_i."""

    def value(entropy: Tensor, logps: Tensor, rows: Completions, index: Tensor) -> Tensor:
        own = coefficients[index, : logps.shape[1]].double()
        return (own * logps.double()).where(rows.loss_mask.bool(), 0.0).sum()

    return value


def weighted_entropies(coefficients: Float[Tensor, "B T"]) -> Value:
    """sum_ik c_ik H_ik, as [`weighted_logps`]: an entropy bonus."""

    def value(entropy: Tensor, logps: Tensor, rows: Completions, index: Tensor) -> Tensor:
        return weighted_logps(coefficients)(logps, entropy, rows, index)

    return value


def scores_and_losses(coefficients: LossCoefficients) -> Value:
    """
    For [`consumed`], of N completions that come twice: the first N rows are their grad S_i, the others what each adds
    to the gradient of the step's loss.
    """
    number = len(coefficients.policy)

    def value(entropy: Tensor, logps: Tensor, rows: Completions, index: Tensor) -> Tensor:
        second, mask = index >= number, rows.loss_mask
        losses = coefficients.surrogate(entropy[second], logps[second], mask[second], index[second] - number)
        return losses + logps[~second].double().where(mask[~second].bool(), 0.0).sum()

    return value


def entropy_shares(policy_entropy: float, num_tokens: float, weights: Float[Tensor, "B T"] | None = None) -> Value:
    """The completions' shares of grad h (T8); `weights` are those of (T6), if another sampler drew them."""

    def value(entropy: Tensor, logps: Tensor, rows: Completions, index: Tensor) -> Tensor:
        own = None if weights is None else weights[index, : rows.completion_mask.shape[1]]
        return surrogate_terms(entropy, logps, rows.loss_mask, policy_entropy, weights=own).sum() / num_tokens

    return value


def gradient_products(
    model: nn.Module,
    completions: Completions,
    value: Value,
    direction: Params,
    temperature: float,
    batch_size: int | None,
) -> Float[Tensor, " B"]:
    """(T9): g_i' v of each completion, g_i the gradient of its share of `value`; no g_i is kept."""
    num_rows = len(completions)
    dots = consumed(model, completions, value, lambda: DotProducts(num_rows, [direction]), temperature, batch_size)
    return dots.values[0]


def _chunks(completions: Completions, rows_at_once: int) -> Iterator[tuple[Int[Tensor, " n"], Completions]]:
    """Completions of similar length at a time: their numbers, and their rows without empty columns."""
    if not len(completions):
        return
    for index in completions.widths.argsort(descending=True, stable=True).split(rows_at_once):
        yield index, completions.rows(index).trimmed()
