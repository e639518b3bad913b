"""Importance weights of one policy on completions drawn from another, and their effective sample size."""

from typing import Literal

from jaxtyping import Bool, Float, Int
from torch import Tensor

WeightForm = Literal["decision", "sequence"]


def importance_weights(
    per_token_logps: Float[Tensor, "B T"],
    sampling_logps: Float[Tensor, "B T"],
    loss_mask: Bool[Tensor, "B T"] | Int[Tensor, "B T"],
    form: WeightForm = "decision",
) -> Float[Tensor, "B T"]:
    """(T6): the weight of every token's entropy under the policy of `per_token_logps`, in float64.

    "decision": w_i,<k = exp(sum_{j<k} S_ij - S'_ij), the ratio of the probabilities of what came *before* token k.
    "sequence": w_i = exp(sum_j S_ij - S'_ij) at every k. S' are the `sampling_logps` of what drew the completions: the
    policy before the step, or the sampler's own (vLLM), which adds the factor prod pi_theta/pi_sampler. Logps in nats;
    masked ones may be anything. Unbiased: E[sum_k w f_k] is the expectation of sum_k f_k under the new policy for
    every f_k of q and o_<k, if the mask ends with the end token and the sampler gives every token a positive
    probability. Differentiable to any order. Source: Precup, Sutton and Singh (2000), per-decision form.
    """
    log_ratios = (per_token_logps.double() - sampling_logps.double()).where(loss_mask.bool(), 0.0)
    return accumulate(log_ratios, form).exp()


def accumulate(per_token: Float[Tensor, "B T"], form: WeightForm) -> Float[Tensor, "B T"]:
    """The sums that enter the weight of token k: over j < k ("decision") or over all j ("sequence")."""
    if form == "sequence":
        return per_token.sum(1, keepdim=True).expand_as(per_token)
    return per_token.cumsum(1) - per_token


def accumulate_transposed(per_token: Float[Tensor, "B T"], form: WeightForm) -> Float[Tensor, "B T"]:
    """Sums over the tokens whose weight token k enters: over j > k ("decision") or over all j ("sequence")."""
    return accumulate(per_token.flip(1), form).flip(1)


def effective_sample_size(weights: Float[Tensor, "B"]) -> Float[Tensor, ""]:
    """(T3): the number of equally weighted completions that would be as informative as these weighted ones.

    (sum w)^2 / sum w^2, in completions. It does not depend on the scale of w. All weights zero: nan (0/0).
    """
    weights = weights.double()
    return effective_sample_size_from_sums(weights.sum(), weights.square().sum())


def effective_sample_size_from_sums(
    weight_sum: Float[Tensor, ""], weight_sq_sum: Float[Tensor, ""]
) -> Float[Tensor, ""]:
    """(T3) from the two sums that are added over ranks and micro-batches: sum w and sum w^2."""
    return weight_sum.double().square() / weight_sq_sum.double()


def loss_weights(
    normalizers: Float[Tensor, "B"] | Int[Tensor, "B"], advantages: Float[Tensor, "B"], num_generations: int
) -> Float[Tensor, "B"]:
    """The weights of (T3) for the loss (T2): 1/(G L_i) where the advantage is not zero, 0 where it is.

    `normalizers` are the L_i of (T2), in tokens: `max_completion_length`, or the longest completion of the group.
    """
    return (num_generations * normalizers.double()).reciprocal().where(advantages != 0, 0.0)
