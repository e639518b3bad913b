"""How much a step changed the entropy per token, measured and predicted, from sums over each completion.

The policy entropy on a probe batch is a ratio R = sum_i N_i / sum_i D_i whose N_i and D_i depend on theta through the
importance weights (T6). Everything here is about R(s) along the step, theta + s dtheta:

    measured      R(1) - R(0)                (T7)        first order   R'(0)                    (T8)
    trapezoid     (R'(0) + R'(1)) / 2        (T10)       second order  R'(0) + R''(0) / 2       (T10)

A micro-batch yields `RatioTerms`, vectors (B,) of N_i and D_i or of their derivatives. These are concatenated over
micro-batches and gathered over ranks. Then a function divides once and returns a `Linearization`, whose
`estimate(prompt_index)` has the standard error clustered by prompt. The derivatives of token scores (`*_tangent`) are
what `torch.func.jvp` along the update returns, at theta for R'(0) and at theta + dtheta for R'(1).

`weights` and `form` are those of `importance_weights`; on-policy at theta all weights are 1. Empty completions count
as completions without tokens; if no completion has a token, values are nan (0/0).
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from trl_entropy.estimators.statistics.estimate import Linearization, delta_method
from trl_entropy.estimators.statistics.importance import WeightForm, accumulate


class RatioTerms(NamedTuple):
    """Per-completion numerator and denominator of the policy entropy (T6), or a derivative of both along the update.

    The numerator in nats, the denominator in tokens (weighted). Of several quantities, a column for each.
    """

    numerator: Float[Tensor, "B *K"]
    denominator: Float[Tensor, "B *K"]


def entropy_terms(
    token_entropy: Float[Tensor, "B T"],
    weights: Float[Tensor, "B T"],
    loss_mask: Bool[Tensor, "B T"] | Int[Tensor, "B T"],
) -> RatioTerms:
    """(T6): N_i = sum_k w_ik H_ik and D_i = sum_k w_ik.

    With -`per_token_logps` in the place of `token_entropy` this is the sampled form (surprisal). With "decision"
    weights that form is biased away from theta, since the drawn token k itself is not reweighted.
    """
    mask = loss_mask.bool()
    return RatioTerms(_masked_sum(weights * token_entropy.double(), mask), _masked_sum(weights.double(), mask))


def tangent_terms(
    token_entropy: Float[Tensor, "B T"],
    token_entropy_tangent: Float[Tensor, "B T"],
    per_token_logps_tangent: Float[Tensor, "B T"],
    weights: Float[Tensor, "B T"],
    loss_mask: Bool[Tensor, "B T"] | Int[Tensor, "B T"],
    form: WeightForm = "decision",
) -> RatioTerms:
    """The derivatives of `entropy_terms` along the update: N'_i = sum_k w (dH + H s) and D'_i = sum_k w s.

    s_ik = d log w_ik is the sum of dS_ij over j < k ("decision") or over all j ("sequence").
    """
    mask = loss_mask.bool()
    log_weight_tangent = accumulate(per_token_logps_tangent.double().where(mask, 0.0), form)
    numerator = token_entropy_tangent.double() + token_entropy.double() * log_weight_tangent
    return RatioTerms(_masked_sum(weights * numerator, mask), _masked_sum(weights * log_weight_tangent, mask))


def second_tangent_terms(
    token_entropy: tuple[Float[Tensor, "B T"], Float[Tensor, "B T"], Float[Tensor, "B T"]],
    per_token_logps_tangents: tuple[Float[Tensor, "B T"], Float[Tensor, "B T"]],
    weights: Float[Tensor, "B T"],
    loss_mask: Bool[Tensor, "B T"] | Int[Tensor, "B T"],
    form: WeightForm = "decision",
) -> RatioTerms:
    """The second derivatives of `entropy_terms` along the update, from H, dH, ddH and dS, ddS of every token.

    N''_i = sum_k w (ddH + 2 dH s + H r) and D''_i = sum_k w r, with r = s^2 + s', s as in `tangent_terms` and s' the
    same sum of ddS.
    """
    mask = loss_mask.bool()
    entropy, first, second = (order.double() for order in token_entropy)
    s, s_tangent = (accumulate(order.double().where(mask, 0.0), form) for order in per_token_logps_tangents)
    r = s.square() + s_tangent
    return RatioTerms(
        _masked_sum(weights * (second + 2 * first * s + entropy * r), mask), _masked_sum(weights * r, mask)
    )


def policy_entropy(terms: RatioTerms) -> Linearization:
    """(T6): the entropy per token, sum N / sum D, in nats. Bias O(1/B), of a ratio."""
    return delta_method(lambda m: m[0] / m[1], torch.stack(terms, 1))


def delta_measured(before: RatioTerms, after: RatioTerms) -> Linearization:
    """(T7): h(theta + dtheta) - h(theta), in nats, both on the same completions.

    `before` and `after` are `entropy_terms` at theta and at theta + dtheta. Completions must be independent of the
    update; on the update's own completions it is the change in sample. Bias O(1/B).
    """
    return delta_method(lambda m: m[2] / m[3] - m[0] / m[1], torch.stack([*before, *after], 1))


def delta_linear(terms: RatioTerms, tangents: RatioTerms) -> Linearization:
    """(T8): the first-order prediction grad h . dtheta = (sum N' - h sum D') / sum D, in nats, with (T8b).

    Completions must be independent of the update, which is taken as given. Bias O(1/B). The influence includes that h
    and the mean length are estimated on these completions; it is the exact derivative of the influence of (T7).
    """
    return delta_method(ratio_slope, torch.stack([*terms, *tangents], 1))


def delta_trapezoid(
    before: RatioTerms, tangents_before: RatioTerms, after: RatioTerms, tangents_after: RatioTerms
) -> Linearization:
    """(T10): the trapezoid (grad h(theta) + grad h(theta + dtheta)) . dtheta / 2, in nats; remainder of third order.

    All terms at theta + dtheta, tangents included, have the importance weights of that point. Otherwise as (T8).
    """
    columns = torch.stack([*before, *tangents_before, *after, *tangents_after], 1)
    return delta_method(lambda m: (ratio_slope(m[:4]) + ratio_slope(m[4:])) / 2, columns)


def delta_second_order(terms: RatioTerms, tangents: RatioTerms, second_tangents: RatioTerms) -> Linearization:
    """(T10): grad h . dtheta + dtheta' (hess h) dtheta / 2, in nats, known before the step. Otherwise as (T8)."""
    columns = torch.stack([*terms, *tangents, *second_tangents], 1)
    return delta_method(lambda m: ratio_slope(m) + ratio_curvature(m) / 2, columns)


def critical_step(delta_linear: Float[Tensor, ""], curvature: Float[Tensor, ""]) -> Float[Tensor, ""]:
    """(T10): eta* = 2 |grad h . v| / |v' (hess h) v|, at which the second-order term is as large as the first.

    In units of v. If v is the update, eta* = 1 says that for a longer step the first order would no longer dominate.
    """
    return 2 * delta_linear.double().abs() / curvature.double().abs()


def critical_length(terms: RatioTerms, tangents: RatioTerms, second_tangents: RatioTerms) -> Linearization:
    """(T10): eta* of `critical_step` along the direction of the tangents, with its influence. Otherwise as (T8)."""
    columns = torch.stack([*terms, *tangents, *second_tangents], 1)
    return delta_method(lambda m: critical_step(ratio_slope(m), ratio_curvature(m)), columns)


def ratio_slope(means: Float[Tensor, "K *R"]) -> Float[Tensor, "*R"]:
    """R' from the means of N, D, N', D'."""
    numerator, denominator, numerator_1, denominator_1 = means[:4]
    return (numerator_1 - numerator / denominator * denominator_1) / denominator


def ratio_curvature(means: Float[Tensor, "K *R"]) -> Float[Tensor, "*R"]:
    """R'' from the means of N, D, N', D', N'', D''."""
    numerator, denominator, _, denominator_1, numerator_2, denominator_2 = means
    surrogate = (numerator_2 - numerator / denominator * denominator_2) / denominator
    return surrogate - 2 * ratio_slope(means) * denominator_1 / denominator


def _masked_sum(values: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"]) -> Float[Tensor, "B"]:
    return values.where(mask, 0.0).sum(1)
