"""What each prompt group contributes to grad h and to the loss gradient, and the entropy change that follows (T17).

Rows X_n and Y_n are the gradients of the two surrogates below, one `torch.autograd.grad` each per group; both are
sums over completions, so a group may be differentiated in parts. Then mean_n X_n = grad h and mean_n Y_n = g.
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from trl_entropy.estimators.entropy_change.surrogate import entropy_surrogate
from trl_entropy.estimators.optimizer.adamw import AdamWSettings, gradient_coefficient, live_preconditioner
from trl_entropy.estimators.statistics.estimate import Estimate
from trl_entropy.estimators.statistics.u_statistic import (
    jackknife_variance,
    row_means,
    u_statistic_estimate,
)


class CrossPromptChange(NamedTuple):
    """(T17): the entropy change that a step's own gradient makes, to first order, nats per token.

    `cross_prompt` pairs different prompts only. `stderr_jackknife` is its conservative error. `same_sample` is the
    plain product of the two means, biased by what each group does to itself.
    """

    cross_prompt: Estimate
    stderr_jackknife: float
    same_sample: float


def group_entropy_surrogate(
    token_entropy: Float[Tensor, "B T"],
    per_token_logps: Float[Tensor, "B T"],
    completion_mask: Bool[Tensor, "B T"] | Int[Tensor, "B T"],
    policy_entropy: float,
    num_tokens: float | int,
    num_prompts: int,
) -> Float[Tensor, ""]:
    """(T17), (T8): a scalar whose gradient is X_n, of a group or its part with B completions; its value means nothing.

    X_n = P / sum(T) sum_ik [grad H_ik + a_ik grad S_ik], i over the group. `policy_entropy` (nats), `num_tokens` =
    sum(T) and P are those of all groups of the step: the two estimates make U a ratio, bias O(1/P).
    """
    share = entropy_surrogate(token_entropy, per_token_logps, completion_mask, policy_entropy, num_tokens)
    return num_prompts * share


def group_loss_surrogate(
    per_token_logps: Float[Tensor, "B T"],
    completion_mask: Bool[Tensor, "B T"] | Int[Tensor, "B T"],
    advantages: Float[Tensor, "B *T"],
    num_generations: int,
    max_completion_length: int,
) -> Float[Tensor, ""]:
    """(T2): a scalar whose gradient is Y_n, P times the group's share of the on-policy loss gradient.

    Y_n = -1/(G L) sum_ik A_i grad S_ik: at ratio 1 nothing is clipped. `advantages` are those that the loss gets, per
    completion (B,) or per token (B, T); with `length_normalizer="group_max"` they carry L / L_i.
    """
    per_token = advantages.double().reshape(len(advantages), -1)
    weighted = (per_token * per_token_logps.double()).where(completion_mask.bool(), 0.0)
    return -weighted.sum() / (num_generations * max_completion_length)


def update_metric(
    exp_avg_sq: Float[Tensor, "*shape"], settings: AdamWSettings, step: int, clip_factor: float
) -> Float[Tensor, "*shape"]:
    """(T17): lr c (1-b1)/(1-b1^t) M, M from `exp_avg_sq` *before* the step; 0 where that is 0.

    With it for M, -U is an entropy change. Coordinates that never had a gradient have no M (1/eps means nothing, T13):
    they are left out, a choice that the sample has no part in. `step` = t counts this step; 1: nan, undefined.
    """
    metric = live_preconditioner(exp_avg_sq, step - 1, settings.betas[1], settings.eps)
    return gradient_coefficient(settings, step, clip_factor) * metric


def cross_prompt_change(gram: Float[Tensor, "P P"]) -> CrossPromptChange:
    """(T17): -U and -Xbar' M Ybar from `gram[n, m]` = X_n' M Y_m with M of `update_metric`.

    The error is over fresh prompts and completions of the step, not of a prediction for the step that was made
    (T8b): the momentum and decay parts of (T5) are left out, the clip factor is taken as given. Bias O(1/P).
    """
    estimate = u_statistic_estimate(gram)
    negative = Estimate(-estimate.value, estimate.stderr, estimate.dof, estimate.num_samples)
    return CrossPromptChange(negative, math.sqrt(jackknife_variance(row_means(gram))), -float(gram.double().mean()))


def accepted_gram(gram: Float[Tensor, "P P"], accepted: Bool[Tensor, "P"]) -> Float[Tensor, "N N"]:
    """(T14a), (T17): X_n' M Y_m of the N accepted groups alone, where N of them make the step's gradient of P groups.

    X_n are of the entropy of accepted groups: with their h, sum(T) and N for P. Y_m are N times the group's share of
    the loss gradient, N/P times what `gram` has, so that their mean is the step's gradient. Given N, U is unbiased for
    what the expected step does to that entropy.
    """
    return gram[accepted][:, accepted] * (float(accepted.sum()) / len(accepted))


def relative_gradient_error(
    loss_row_sum: Float[Tensor, "D"], num_prompts: int, gradient: Float[Tensor, "D"]
) -> Float[Tensor, ""]:
    """|mean_n Y_n - g| / |g| with `loss_row_sum` = sum_n Y_n and the optimizer's unclipped g; g = 0: nan (0/0) or inf.

    Rounding, unless training computes something else than the on-policy loss in float32: dropout, bf16.
    """
    error = loss_row_sum / num_prompts - gradient
    return torch.linalg.vector_norm(error) / torch.linalg.vector_norm(gradient)
