"""What one step did to the entropy on a probe batch, from the scores of its tokens before and after."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from trl_entropy.estimators.entropy_change.delta_entropy import (
    RatioTerms,
    delta_linear,
    delta_measured,
    delta_second_order,
    delta_trapezoid,
    entropy_terms,
    second_tangent_terms,
    tangent_terms,
)
from trl_entropy.estimators.statistics.estimate import Linearization
from trl_entropy.estimators.statistics.importance import WeightForm, effective_sample_size, importance_weights

Derivatives = tuple[Float[Tensor, "B T"], ...]  # a score of every token, and its derivatives along the update


class PointTerms(NamedTuple):
    """Per-completion terms of (T6) and of its derivatives at one value of the parameters."""

    terms: RatioTerms
    tangents: RatioTerms | None = None
    second_tangents: RatioTerms | None = None


def point_terms(
    entropy: Derivatives,
    logps: Derivatives,
    sampling_logps: Float[Tensor, "B T"],
    loss_mask: Bool[Tensor, "B T"] | Int[Tensor, "B T"],
    form: WeightForm = "decision",
) -> PointTerms:
    """The terms of (T6) and their derivatives along the update: none, the first, or the first and second.

    `entropy` and `logps` (nats) hold the value of every token's score, and as many of its derivatives.
    `sampling_logps` are those of the policy that drew the completions; at that policy all weights are 1.
    """
    weights = importance_weights(logps[0], sampling_logps, loss_mask, form)
    first = second = None
    if len(entropy) > 1:
        first = tangent_terms(entropy[0], entropy[1], logps[1], weights, loss_mask, form)
    if len(entropy) > 2:
        second = second_tangent_terms(entropy[:3], logps[1:3], weights, loss_mask, form)
    return PointTerms(entropy_terms(entropy[0], weights, loss_mask), first, second)


def step_changes(before: PointTerms, after: PointTerms, planned: PointTerms | None = None) -> dict[str, Linearization]:
    """Measured (T7), first order (T8), trapezoid (T10) and second order (T10) of one step, in nats per token.

    A prediction whose derivatives the terms lack is left out.
    All are on the same completions, which must be independent of the update. They are paired, so that their
    differences have small errors. `planned` are the terms before the step with second derivatives along the planned
    update.
    """
    changes = {"measured": delta_measured(before.terms, after.terms)}
    if before.tangents is not None:
        changes["linear"] = delta_linear(before.terms, before.tangents)
    if before.tangents is not None and after.tangents is not None:
        changes["trapezoid"] = delta_trapezoid(before.terms, before.tangents, after.terms, after.tangents)
    if planned is not None and planned.tangents is not None and planned.second_tangents is not None:
        changes["second_order"] = delta_second_order(planned.terms, planned.tangents, planned.second_tangents)
    return changes


def importance_sample_size(drawn: PointTerms, other: PointTerms) -> float:
    """(T3) for each completion's mean weight: how many equally weighted completions are as informative as these.

    `drawn` are the terms under the policy that drew them, or nearly did, `other` those under the one at the step's
    other end. The weight is the mean over tokens. Their sum would count different lengths as a loss, even without an
    update.
    """
    return effective_sample_size(other.terms.denominator / drawn.terms.denominator).item()


def stacked(terms: PointTerms) -> Float[Tensor, "B columns"]:
    """The terms as columns of one tensor, for gathering over ranks; [`unstacked`] takes them apart again."""
    return torch.stack([column for part in terms if part is not None for column in part], dim=1)


def unstacked(columns: Float[Tensor, "B columns"]) -> PointTerms:
    """Inverse of [`stacked`]."""
    pairs = columns.unbind(1)
    return PointTerms(*(RatioTerms(pairs[i], pairs[i + 1]) for i in range(0, len(pairs), 2)))
