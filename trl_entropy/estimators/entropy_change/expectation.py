"""How a step changed the expectation of any number of a completion (T21): reward, length, a metric of the user's.

Such a number f(o) does not depend on the parameters, so that only the weights of completions carry them. As (T6) a
value is sum_i N_i / sum_i D_i with N_i and D_i from `expectation_terms`, and everything of `step_change` holds for it:

    N_i = w_i (f_i - b_i) + b_i,  D_i = 1      where every completion has a number: unbiased
    N_i = w_i f_i,                D_i = w_i    over the completions that have one: a ratio, bias O(1/P)
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from trl_entropy.estimators.entropy_change.delta_entropy import RatioTerms
from trl_entropy.estimators.entropy_change.step_change import PointTerms


def log_weight_sums(
    logps: tuple[Float[Tensor, "B T"], ...],
    sampling_logps: Float[Tensor, "B T"],
    loss_mask: Bool[Tensor, "B T"] | Int[Tensor, "B T"],
) -> Float[Tensor, "B orders"]:
    """(T21): log w_i, w the sequence weight of (T6), and as many of its derivatives along the update as `logps` has.

    Nats. A number of the whole completion takes the weight of all of its tokens, not of those before one of them.
    """
    mask = loss_mask.bool()
    orders = (logps[0].double() - sampling_logps.double(), *(order.double() for order in logps[1:]))
    return torch.stack([order.where(mask, 0.0).sum(1) for order in orders], dim=1)


def baseline(values: Float[Tensor, "B *K"], prompt_index: Int[Tensor, "B"]) -> Float[Tensor, "B *K"]:
    """(T21): b_i, the mean of the *other* completions of the prompt, or where some prompt has one alone of all others.

    It does not depend on completion i, and E[1 - w] = 0 given the prompt, so that it adds no bias. 0 for a single
    completion. A column for each of several quantities.
    """
    position = prompt_index.unique(return_inverse=True)[1]
    values, counts = values.double(), position.bincount()
    if int(counts.min()) < 2:
        position, counts = torch.zeros_like(position), counts.sum()[None]
    sums = values.new_zeros(len(counts), *values.shape[1:]).index_add(0, position, values)
    others = (counts[position] - 1).clamp(min=1)
    return (sums[position] - values) / others.view(-1, *[1] * (values.dim() - 1))


def slope_coefficients(
    values: Float[Tensor, "B"], log_weights: Float[Tensor, "B orders"], prompt_index: Int[Tensor, "B"]
) -> Float[Tensor, "B"]:
    """(T22): c_i with sum_i c_i grad S_i = grad E[f] at the parameters that `log_weights` are of, units of f per nat.

    Arguments as for [`expectation_terms`], of the completions of all ranks.
    """
    weights, known = log_weights[:, 0].exp(), ~values.isnan()
    if bool(known.all()):
        return weights * (values.double() - baseline(values, prompt_index)) / len(values)
    weights = weights * known
    numbers = values.double().where(known, 0.0)
    return weights * (numbers - (weights * numbers).sum() / weights.sum()) / weights.sum()


def expectation_terms(
    values: Float[Tensor, "B *K"], log_weights: Float[Tensor, "B orders"], prompt_index: Int[Tensor, "B"]
) -> PointTerms:
    """(T21): the terms of E[f] and of its derivative along the update, at the parameters that `log_weights` are of.

    `values` are f_i of all completions of all ranks, of several quantities in columns, nan where f has none: then the
    expectation is over those that have one, and if no completion has, it is nan. `log_weights` are [`log_weight_sums`]
    at the same place.
    """
    wide = (-1, *[1] * (values.dim() - 1))
    weights, known = log_weights[:, 0].exp().view(wide), ~values.isnan()
    level = baseline(values, prompt_index)
    of_all, weighted = weights * (values.double() - level), weights * values.double().where(known, 0.0)
    complete = known.all(0)
    terms = RatioTerms(
        (of_all + level).where(complete, weighted), torch.ones_like(weighted).where(complete, weights * known)
    )
    if log_weights.shape[1] == 1:
        return PointTerms(terms)
    slope = log_weights[:, 1].view(wide)
    derivatives = of_all.where(complete, weighted), torch.zeros_like(weighted).where(complete, weights * known)
    return PointTerms(terms, RatioTerms(*(slope * column for column in derivatives)))
