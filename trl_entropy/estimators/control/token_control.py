"""The tokens that Clip-Cov and KL-Cov act on (arXiv:2505.22617), those that cost most, and random ones beside them.

A token's covariance is (S_ik - S_bar) (A_i - A_bar), log-probability and advantage less their means over all tokens of
the batch, or A_i (S_ik + H_ik), the log-probability less its mean under the token's own distribution. It is large
where a likely token is rewarded or an unlikely one is punished, which lowers the entropy (T11).
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def token_covariances(
    per_token_logps: Float[Tensor, "B T"],
    advantages: Float[Tensor, "B *T"],
    loss_mask: Bool[Tensor, "B T"] | Int[Tensor, "B T"],
) -> Float[Tensor, "B T"]:
    """(S - S_bar)(A - A_bar), nats x advantage, of rows of *all* processes and micro-batches; nan under the mask."""
    mask, logps = loss_mask.bool(), per_token_logps.double()
    per_token = advantages.double().reshape(len(advantages), -1).expand(mask.shape)
    centred = (values - values[mask].mean() for values in (logps, per_token))
    first, second = centred
    return (first * second).where(mask, math.nan)


def centred_covariances(
    per_token_logps: Float[Tensor, "B T"],
    token_entropy: Float[Tensor, "B T"],
    advantages: Float[Tensor, "B *T"],
    loss_mask: Bool[Tensor, "B T"] | Int[Tensor, "B T"],
) -> Float[Tensor, "B T"]:
    """A (S + H), nats x advantage: S less its mean under the distribution that the token was drawn from, which is -H.

    It compares a token with the others that could have stood in its place, and with no other token of the batch, so
    that it does not depend on what the batch holds. nan under the mask.
    """
    mask = loss_mask.bool()
    per_token = advantages.double().reshape(len(advantages), -1).expand(mask.shape)
    return (per_token * (per_token_logps.double() + token_entropy.double())).where(mask, math.nan)


def num_chosen(loss_mask: Bool[Tensor, "B T"] | Int[Tensor, "B T"], fraction: float) -> int:
    """The number of tokens that is this fraction of all: at least one, unless the fraction is 0."""
    return max(1, int(fraction * int(loss_mask.sum()))) if fraction else 0


def clip_cov_tokens(
    covariances: Float[Tensor, "B T"],
    bounds: tuple[float, float],
    count: int,
    order: Float[Tensor, "B T"],
    quantiles: bool = False,
) -> Bool[Tensor, "B T"]:
    """
    Clip-Cov: `count` random tokens of those whose covariance lies between the bounds, or all of them if fewer.

    Args:
        covariances: from [`token_covariances`].
        bounds: lower and upper bound, both excluded; with `quantiles` they are quantiles of the covariances.
        order: independent uniform numbers; the tokens with the smallest are taken.
    """
    if quantiles:
        known = covariances[~covariances.isnan()]
        bounds = tuple(torch.quantile(known, torch.tensor(bounds, dtype=known.dtype, device=known.device)).tolist())
    eligible = (covariances > bounds[0]) & (covariances < bounds[1])
    return _smallest(order, eligible, count)


def kl_cov_tokens(covariances: Float[Tensor, "B T"], count: int) -> Bool[Tensor, "B T"]:
    """KL-Cov, and Clip-Cov's top fraction: the `count` tokens of the largest covariance, of those that have one."""
    return _smallest(-covariances, ~covariances.isnan(), count)


def exchange_tokens(
    entropy_parts: Float[Tensor, "B T"],
    reward_parts: Float[Tensor, "B T"],
    loss_mask: Bool[Tensor, "B T"] | Int[Tensor, "B T"],
    count: int,
) -> Bool[Tensor, "B T"]:
    """(T24): the `count` tokens that lose most entropy for the reward that they earn, or all that lose any if fewer.

    `entropy_parts` and `reward_parts` are each token's parts of the first-order change of both. A token that earns
    nothing, or loses reward, loses entropy for nothing: these come first, those that lose most entropy before others.
    """
    lost, earned = -entropy_parts.double(), reward_parts.double()
    ratio = torch.where(earned > 0, lost / earned, math.inf)
    among = loss_mask.bool() & (lost > 0)
    by_loss = (-lost).where(among, math.inf).flatten().argsort(stable=True)
    by_ratio = (-ratio).where(among, math.inf).flatten()[by_loss].argsort(stable=True)
    chosen = torch.zeros_like(among)
    chosen.view(-1)[by_loss[by_ratio][: min(count, int(among.sum()))]] = True
    return chosen


def random_tokens(
    loss_mask: Bool[Tensor, "B T"] | Int[Tensor, "B T"], count: int, order: Float[Tensor, "B T"]
) -> Bool[Tensor, "B T"]:
    """`count` random tokens, with which a choice of tokens is to be compared."""
    return _smallest(order, loss_mask.bool(), count)


def random_positive_tokens(
    loss_mask: Bool[Tensor, "B T"] | Int[Tensor, "B T"],
    advantages: Float[Tensor, "B *T"],
    count: int,
    order: Float[Tensor, "B T"],
) -> Bool[Tensor, "B T"]:
    """`count` random tokens of those with positive advantage, or all of these if fewer."""
    positive = advantages.reshape(len(advantages), -1) > 0
    return _smallest(order, loss_mask.bool() & positive, count)


def ratio_clipped(
    per_token_logps: Float[Tensor, "B T"],
    old_logps: Float[Tensor, "B T"],
    advantages: Float[Tensor, "B *T"],
    epsilons: tuple[float, float],
) -> Bool[Tensor, "B T"]:
    """Where min(ratio A, clip(ratio, 1 - low, 1 + high) A) is the clipped term, so that a token has no gradient."""
    ratio, per_token = (per_token_logps - old_logps).exp(), advantages.reshape(len(advantages), -1)
    return ratio.clamp(1 - epsilons[0], 1 + epsilons[1]) * per_token < ratio * per_token


def _smallest(values: Float[Tensor, "B T"], among: Bool[Tensor, "B T"], count: int) -> Bool[Tensor, "B T"]:
    chosen = torch.zeros_like(among)
    ranked = values.where(among, math.inf).flatten().argsort(stable=True)[: min(count, int(among.sum()))]
    chosen.view(-1)[ranked] = True
    return chosen


def kl_cov_penalty(
    per_token_logps: Float[Tensor, "B T"],
    old_logps: Float[Tensor, "B T"],
    chosen: Bool[Tensor, "B T"],
    coefficient: float,
    normalizer: float,
) -> Float[Tensor, ""]:
    """KL-Cov's term: coefficient |S - S_old| summed over the chosen tokens, over the loss's normalizer.

    Its gradient is 0 where S = S_old, so that without off-policy updates KL-Cov does nothing.
    """
    return coefficient * (per_token_logps - old_logps.detach()).abs().where(chosen, 0.0).sum() / normalizer
