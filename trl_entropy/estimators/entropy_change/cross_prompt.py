"""The entropy change by a step's own gradient, without what each prompt group does to itself (T17).

Rows X_n and Y_n are what prompt group n contributes to grad h and to the loss gradient g: the gradients of the two
surrogates below, each by one `torch.autograd.grad` per group. Both are sums over completions, so that a group may be
differentiated in parts. mean_n X_n = grad h and mean_n Y_n = g.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from trl_entropy.estimators.entropy_change.surrogate import entropy_surrogate
from trl_entropy.estimators.statistics.estimate import Estimate
from trl_entropy.estimators.statistics.u_statistic import (
    row_means,
    u_statistic_estimate,
    u_statistic_jackknife_estimate,
)


class CrossPromptChange(NamedTuple):
    """(T17): the entropy change that a step's own gradient makes, to first order, nats per token.

    `cross_prompt` takes products of different prompts only; its standard error is the jackknife's, which is
    conservative. `stderr_unbiased` comes from the unbiased estimate of the variance: nan where that is negative, which
    with few prompts it often is, so that intervals made of it cover too little (docs/intervals.md).
    `same_sample` is the product of the two means, which is biased by what each group does to itself.
    """

    cross_prompt: Estimate
    stderr_unbiased: float
    same_sample: float


def group_entropy_surrogate(
    token_entropy: Float[Tensor, "B T"],
    per_token_logps: Float[Tensor, "B T"],
    loss_mask: Bool[Tensor, "B T"] | Int[Tensor, "B T"],
    policy_entropy: float,
    num_tokens: float | int,
    num_prompts: int,
    weights: Float[Tensor, "B T"] | None = None,
) -> Float[Tensor, ""]:
    """(T17), (T8): a scalar whose gradient is X_n of a group, or of B of its completions; its value has no meaning.

    X_n = P / sum(T) sum_ik [grad H_ik + a_ik grad S_ik], i over the group, with the `weights` of (T6) if another
    sampler drew them. `policy_entropy` (nats), `num_tokens` = sum(T), or of the weights, and P are those of all groups
    of the step. As the first two are estimates, U is a ratio with bias O(1/P).
    """
    share = entropy_surrogate(token_entropy, per_token_logps, loss_mask, policy_entropy, num_tokens, weights=weights)
    return num_prompts * share


def cross_prompt_change(gram: Float[Tensor, "P P"]) -> CrossPromptChange:
    """(T17): -U and -Xbar' M Ybar from `gram[n, m]` = X_n' M Y_m, M the metric *before* the step.

    With lr c (1-b1)/(1-b1^t) M in the place of M, -U is an entropy change. M from before the step does not depend on
    the sample; coordinates that never had a gradient have no meaningful one (it would be 1/eps, T13) and are left out.

    The standard error is over fresh prompts and completions of the step; it is not that of a prediction for the step
    that was made (T8b). The momentum and decay parts of (T5) are left out, and the clip factor is taken as given. Bias
    O(1/P).
    """
    estimate = u_statistic_jackknife_estimate(row_means(gram))
    negative = Estimate(-estimate.value, estimate.stderr, estimate.dof, estimate.num_samples)
    return CrossPromptChange(negative, u_statistic_estimate(gram).stderr, -float(gram.double().mean()))


def accepted_gram(
    gram: Float[Tensor, "P P"], accepted: Bool[Tensor, "P"], share: float | None = None
) -> Float[Tensor, "N N"]:
    """(T14a), (T17): X_n' M Y_m of the N accepted groups alone, where N of them make the step's gradient of P groups.

    X_n must be of the entropy of accepted groups, with their h and sum(T), and N in the place of P. Y_m become N times
    the group's share of the loss gradient, which is N/P times those in `gram`, so that their mean is the step's
    gradient. Given N, U is then unbiased for what the expected step does to that entropy. If `gram` is of
    some of the step's groups alone, give N/P of all of them as `share`.
    """
    return gram[accepted][:, accepted] * (float(accepted.sum()) / len(accepted) if share is None else share)


def relative_gradient_error(
    loss_row_sum: Float[Tensor, "D"], num_prompts: int, gradient: Float[Tensor, "D"]
) -> Float[Tensor, ""]:
    """|mean_n Y_n - g| / |g| with `loss_row_sum` = sum_n Y_n and the optimizer's unclipped g; g = 0: nan (0/0) or inf.

    This is rounding, unless training computes anything but the on-policy loss in float32, as with dropout or bf16.
    """
    error = loss_row_sum / num_prompts - gradient
    return torch.linalg.vector_norm(error) / torch.linalg.vector_norm(gradient)
