"""Derivatives of the policy entropy by a reverse pass and by a Hessian-vector product, to check the fast ones."""

from jaxtyping import Bool, Float, Int
from torch import Tensor

from trl_entropy.estimators.entropy_change.delta_entropy import RatioTerms
from trl_entropy.estimators.statistics.importance import WeightForm, importance_weights


def tangent_terms_from_dot_products(
    contributions: Float[Tensor, "B"], terms: RatioTerms, length_change: float = 0.0
) -> RatioTerms:
    """(T8b): stand-in for `tangent_terms` where only c_i = N'_i - h D'_i is known, from a reverse pass.

    c_i is the gradient of `surrogate_terms` of completion i, dotted with the update; h = sum N / sum D.
    `length_change` = sum D' / sum D, the relative change of the mean length to first order: measured, it is
    sum D(theta + dtheta) / sum D(theta) - 1. Exact, in value and influence, in every function of this file that takes
    tangents, for any c_i; a `length_change` left at 0 leaves the value and neglects in the standard error that h was
    estimated on the same completions.
    """
    policy_entropy = terms.numerator.sum() / terms.denominator.sum()
    denominator = length_change * terms.denominator
    return RatioTerms(contributions.double() + policy_entropy * denominator, denominator)


def ratio_surrogate(
    token_entropy: Float[Tensor, "B T"],
    per_token_logps: Float[Tensor, "B T"],
    sampling_logps: Float[Tensor, "B T"],
    completion_mask: Bool[Tensor, "B T"] | Int[Tensor, "B T"],
    policy_entropy: float,
    num_tokens: float | int,
    form: WeightForm = "decision",
) -> Float[Tensor, ""]:
    """(T10): a scalar whose gradient is grad h and whose Hessian enters `curvature_from_hessian_vector_product`.

    sum_i sum_k w_ik (H_ik - h) / `num_tokens` with the weights of (T6) left differentiable. At theta, on-policy,
    `sampling_logps` are `per_token_logps.detach()`. `policy_entropy` and `num_tokens` as in `entropy_surrogate`.
    """
    mask = completion_mask.bool()
    weights = importance_weights(per_token_logps, sampling_logps.detach(), mask, form)
    centred = (token_entropy.double() - policy_entropy).where(mask, 0.0)  # before the product: a nan has no gradient
    return (weights * centred).sum() / num_tokens


def curvature_from_hessian_vector_product(
    surrogate_curvature: Float[Tensor, ""], delta_linear: Float[Tensor, ""], length_change: Float[Tensor, ""]
) -> Float[Tensor, ""]:
    """(T10): dtheta' (hess h) dtheta, in nats, from the Hessian of `ratio_surrogate` summed over micro-batches.

    R'' = dtheta' (hess surrogate) dtheta - 2 R' sum D' / sum D: the surrogate, a sum over completions, lacks the
    change of the ratio's denominator. `length_change` = sum D' / sum D as in `tangent_terms_from_dot_products`.
    """
    return surrogate_curvature.double() - 2 * delta_linear.double() * length_change.double()
