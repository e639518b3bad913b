"""Scalars whose gradients, summed over micro-batches, are the gradient of the policy entropy."""

from jaxtyping import Bool, Float, Int
from torch import Tensor

from trl_entropy.estimators.statistics.importance import WeightForm, accumulate_transposed


def score_coefficients(
    token_entropy: Float[Tensor, "B T"],
    loss_mask: Bool[Tensor, "B T"] | Int[Tensor, "B T"],
    policy_entropy: float,
    *,
    weights: Float[Tensor, "B T"] | None = None,
    form: WeightForm = "decision",
    baseline: Float[Tensor, "B T"] | None = None,
) -> Float[Tensor, "B T"]:
    """(T8): a_ik, the coefficients of grad S_ik in grad h, in nats; no gradient flows through them.

    "decision": a_ik = sum_{j>k} w_ij (H_ij - h) - b_ik. "sequence": a_ik = sum_j w_ij (H_ij - h) - b_ik.
    `weights` are those of (T6) at the point where grad h is wanted; None stands for 1 everywhere, as at theta. The
    coefficients are 0 under the mask. b_ik may be any function of q and o_<k; away from theta it must be multiplied by
    the weight of all tokens up to and including k.
    """
    mask = loss_mask.bool()
    centred = token_entropy.detach().double() - policy_entropy
    if weights is not None:
        centred = weights.detach() * centred
    coefficients = accumulate_transposed(centred.where(mask, 0.0), form)
    if baseline is not None:
        coefficients = coefficients - baseline.double()
    return coefficients.where(mask, 0.0)


def surrogate_terms(
    token_entropy: Float[Tensor, "B T"],
    per_token_logps: Float[Tensor, "B T"],
    loss_mask: Bool[Tensor, "B T"] | Int[Tensor, "B T"],
    policy_entropy: float,
    *,
    weights: Float[Tensor, "B T"] | None = None,
    form: WeightForm = "decision",
    baseline: Float[Tensor, "B T"] | None = None,
) -> Float[Tensor, "B"]:
    """(T8): per completion, a value whose gradient is sum_k [ w_ik grad H_ik + a_ik grad S_ik ].

    The sum of these gradients over E, divided by the sum of the weights over *all* of E (`num_tokens`; on-policy the
    number of tokens), is grad h. `policy_entropy` is h at the same point, over all of E
    (`policy_entropy(terms).value`). With the exact h and mean length the result is unbiased; with those of the same
    completions it is a ratio with bias O(1/B). Only the first derivative has a meaning, as the coefficients are
    detached; the value has none.
    """
    coefficients = score_coefficients(
        token_entropy, loss_mask, policy_entropy, weights=weights, form=form, baseline=baseline
    )
    entropy = token_entropy.double() if weights is None else weights.detach() * token_entropy.double()
    return (entropy + coefficients * per_token_logps.double()).where(loss_mask.bool(), 0.0).sum(1)


def entropy_surrogate(
    token_entropy: Float[Tensor, "B T"],
    per_token_logps: Float[Tensor, "B T"],
    loss_mask: Bool[Tensor, "B T"] | Int[Tensor, "B T"],
    policy_entropy: float,
    num_tokens: float | int,
    *,
    weights: Float[Tensor, "B T"] | None = None,
    form: WeightForm = "decision",
    baseline: Float[Tensor, "B T"] | None = None,
) -> Float[Tensor, ""]:
    """(T8), and (T10) with `weights`: this micro-batch's share of a scalar whose gradient is grad h.

    sum_i `surrogate_terms`_i / `num_tokens`. Call backward once per micro-batch; the gradients of micro-batches and
    ranks must be *summed*, not averaged, because h and `num_tokens` = sum D are those of all of E.
    """
    terms = surrogate_terms(
        token_entropy,
        per_token_logps,
        loss_mask,
        policy_entropy,
        weights=weights,
        form=form,
        baseline=baseline,
    )
    return terms.sum() / num_tokens
