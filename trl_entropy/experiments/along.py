"""The policy's entropy along one direction from a state: its derivatives at theta, its true change at some lengths."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from trl_entropy.estimators.entropy_change.delta_entropy import (
    RatioTerms,
    delta_linear,
    delta_measured,
    delta_second_order,
    entropy_terms,
)
from trl_entropy.estimators.entropy_change.step_change import PointTerms, point_terms, stacked, unstacked
from trl_entropy.estimators.statistics.estimate import Linearization
from trl_entropy.estimators.statistics.importance import effective_sample_size, importance_weights
from trl_entropy.experiments.state import FixedState
from trl_entropy.gradients.scores import Params
from trl_entropy.rollouts.completions import Completions


def columns_along(
    state: FixedState,
    completions: Completions,
    direction: Params,
    factors: Sequence[float],
    order: int,
    batch_size: int,
) -> Float[Tensor, "B columns"]:
    """
    Per-completion terms of the entropy at theta and at some points along `direction`; [`points_of`] takes them apart.

    Returns:
        Columns: `stacked` terms at theta with `order` derivatives, then numerator and denominator of (T6) at
        theta + factor * `direction` for each factor.
    """
    mask = completions.loss_mask
    at = state.score(completions, batch_size, direction=direction, order=order)
    columns = [stacked(point_terms(at.entropy, at.logps, at.logps[0], mask))]
    for factor in factors:
        params = {name: value + factor * direction[name] for name, value in state.before.items()}
        there = state.score(completions, batch_size, params)
        weights = importance_weights(there.logps[0], at.logps[0], mask)
        columns.append(torch.stack(entropy_terms(there.entropy[0], weights, mask), dim=1))
    return torch.cat(columns, dim=1).cpu()


def points_of(columns: Float[Tensor, "B columns"], num_factors: int) -> tuple[PointTerms, list[RatioTerms]]:
    """The terms at theta with their derivatives, and the terms at each factor."""
    width = columns.shape[1] - 2 * num_factors
    return unstacked(columns[:, :width]), [RatioTerms(*pair.unbind(1)) for pair in columns[:, width:].split(2, dim=1)]


def changes_at(start: PointTerms, there: RatioTerms, factor: float) -> dict[str, Linearization]:
    """True change at `factor` times the direction, the predictions from derivatives at theta, and their errors."""

    def scaled(terms: RatioTerms, by: float) -> RatioTerms:
        return RatioTerms(*(by * column for column in terms))

    assert start.tangents is not None
    tangents = scaled(start.tangents, factor)
    changes = {"measured": delta_measured(start.terms, there), "linear": delta_linear(start.terms, tangents)}
    if start.second_tangents is not None:
        second = scaled(start.second_tangents, factor**2)
        changes["second_order"] = delta_second_order(start.terms, tangents, second)
    errors = {f"error_{n}": c - changes["measured"] for n, c in changes.items() if n != "measured"}
    return changes | errors


def sample_size_at(start: PointTerms, there: RatioTerms) -> float:
    """(T3): effective number of completions under the importance weights at that point."""
    return float(effective_sample_size(there.denominator / start.terms.denominator))
