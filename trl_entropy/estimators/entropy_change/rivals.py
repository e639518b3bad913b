"""Published predictors of the entropy change, for comparison on the same step."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from trl_entropy.estimators.statistics.estimate import Linearization, delta_method


class CovarianceTerms(NamedTuple):
    """Per-completion sums over tokens, from which the covariance over all tokens is computed."""

    num_tokens: Float[Tensor, "B"]
    first: Float[Tensor, "B"]
    second: Float[Tensor, "B"]
    product: Float[Tensor, "B"]


def natural_gradient_terms(
    per_token_logps: Float[Tensor, "B T"],
    advantages: Float[Tensor, "B"] | Float[Tensor, "B T"],
    loss_mask: Bool[Tensor, "B T"] | Int[Tensor, "B T"],
) -> CovarianceTerms:
    """(T11): the sums for Cov(log pi, A) over tokens; logps in nats, at the sampling temperature."""
    return _covariance_terms(per_token_logps, _per_token(advantages), loss_mask)


def policy_gradient_terms(
    per_token_logps: Float[Tensor, "B T"],
    advantages: Float[Tensor, "B"] | Float[Tensor, "B T"],
    loss_mask: Bool[Tensor, "B T"] | Int[Tensor, "B T"],
) -> CovarianceTerms:
    """(T11): the sums for Cov(log pi, pi A) over tokens; logps in nats, at the sampling temperature."""
    return _covariance_terms(per_token_logps, per_token_logps.double().exp() * _per_token(advantages), loss_mask)


def delta_covariance(terms: CovarianceTerms) -> Linearization:
    """(T11): minus the covariance over all tokens of the update batch, to which the entropy change is proportional.

    -Cov(log pi, A) for a natural-gradient step and -Cov(log pi, pi A) for a policy-gradient step of a softmax that has
    a parameter of its own for every logit. In nats, up to a step length that is not that of an optimizer, so that it
    should be compared by correlation. The paper's covariance is over each state's actions; this one, which Clip-Cov
    takes too, is over the tokens of all states (divisor: their number). Bias O(1/B). Source: Cui et al.,
    arXiv:2505.22617.
    """
    return delta_method(lambda m: m[1] / m[0] * m[2] / m[0] - m[3] / m[0], torch.stack(terms, 1))


def _covariance_terms(
    first: Float[Tensor, "B T"],
    second: Float[Tensor, "B #T"],
    loss_mask: Bool[Tensor, "B T"] | Int[Tensor, "B T"],
) -> CovarianceTerms:
    first, second = first.double(), second.double().expand_as(first)
    sums = (torch.ones_like(first), first, second, first * second)
    return CovarianceTerms(*(values.where(loss_mask.bool(), 0.0).sum(1) for values in sums))


def _per_token(advantages: Float[Tensor, "B *T"]) -> Float[Tensor, "B _"]:
    return advantages.double() if advantages.ndim == 2 else advantages.double().unsqueeze(1)
