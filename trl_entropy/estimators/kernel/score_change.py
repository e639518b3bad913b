"""The predicted change of each completion's log-probability by a step, and which completions make it (T12)."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from trl_entropy.estimators.statistics.estimate import Estimate, cluster_sums
from trl_entropy.estimators.statistics.pooled import jackknife_ratio


class ScoreChangeParts(NamedTuple):
    """(T12): the parts of the first-order change of each S_i, in nats; their sum is grad S_i . dtheta.

    `own` is made by completion i itself, `same_prompt` by the others of its prompt, `other_prompts` by the rest of
    this step's gradient, `momentum` by earlier gradients, and `weight_decay` by the weight decay.
    """

    momentum: Float[Tensor, "N"]
    weight_decay: Float[Tensor, "N"]
    own: Float[Tensor, "N"]
    same_prompt: Float[Tensor, "N"]
    other_prompts: Float[Tensor, "N"]


def score_change_parts(
    products: Float[Tensor, "N N"],
    prompt_index: Int[Tensor, "N"],
    coefficient: float,
    score_dot_gradient: Float[Tensor, "N"],
    score_dot_momentum: Float[Tensor, "N"],
    score_dot_decay: Float[Tensor, "N"],
) -> ScoreChangeParts:
    """(T12): change of S_i = grad S_i . (momentum + decay) + lr c (1-b1)/(1-b1^t) sum over j in U of K_ij alpha_j.

    `products[i, j]` = K_ij alpha_j = -grad S_i' M g_j, with g_j completion j's share of the unclipped g; where alpha
    differs between the tokens of a completion only the second form holds. `score_dot_gradient` = grad S_i' M g is over
    *all* of U. The N rows may be part of U if they hold whole prompt groups; completions of the same prompt that are
    not among them would count as other prompts. `coefficient` is `gradient_coefficient`; momentum and decay are the
    parts of (T5), and M is that of the step (T4), this gradient included. Exact to first order, and, unlike (T17),
    about the step that was made.
    """
    own_products = products.double().diagonal()
    same = prompt_index[:, None] == prompt_index
    same_products = products.double().where(same, 0.0).sum(1) - own_products
    return ScoreChangeParts(
        momentum=score_dot_momentum.double(),
        weight_decay=score_dot_decay.double(),
        own=coefficient * own_products,
        same_prompt=coefficient * same_products,
        other_prompts=coefficient * (-score_dot_gradient.double() - own_products - same_products),
    )


def score_change_sums(parts: ScoreChangeParts, prompt_index: Int[Tensor, "N"]) -> Float[Tensor, "P parts"]:
    """For each prompt and part, the sum over completions of part_i times the whole change of S_i."""
    whole = sum(parts)
    return torch.stack([cluster_sums(part * whole, prompt_index) for part in parts], 1)


def score_change_shares(prompt_sums: Float[Tensor, "P parts"]) -> dict[str, Estimate]:
    """(T12): each part's share of the predicted change, sum_i part_i whole_i / sum_i whole_i^2; the shares sum to 1.

    They are projections on the whole change, since parts of both signs would cancel in plain sums. The argument is
    from `score_change_sums`, of a step or of several with their prompts concatenated. Errors by the jackknife over
    prompts, bias O(1/P). A share is negative where the part works against the whole.
    """
    whole = prompt_sums.sum(1)
    return {name: jackknife_ratio(prompt_sums[:, i], whole) for i, name in enumerate(ScoreChangeParts._fields)}


def change_agreement(
    predicted: Float[Tensor, "N"], measured: Float[Tensor, "N"], prompt_index: Int[Tensor, "N"]
) -> tuple[Estimate, float]:
    """(T12): slope through the origin of measured on predicted changes, sum p m / sum p^2, and their correlation.

    The slope has a jackknife error over prompts and bias O(1/P). It is 1 where first order holds. No change: nan
    (0/0).
    """
    predicted, measured = predicted.double(), measured.double()
    sums = cluster_sums(torch.stack([predicted * measured, predicted.square()], 1), prompt_index)
    correlation = float(torch.corrcoef(torch.stack([predicted, measured]))[0, 1])
    return jackknife_ratio(sums[:, 0], sums[:, 1]), correlation
