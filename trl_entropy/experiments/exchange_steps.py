"""The steps that methods of entropy control make from a fixed state, all from one redraw of the rollouts."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from trl_entropy.control.entropy_control import (
    DEFAULT_CAP,
    DEFAULT_METRIC_FLOOR,
    half_gradients,
    score_prompt_halves,
)
from trl_entropy.engine import UpdateContext
from trl_entropy.engine.optimizer_step import (
    preconditioner_before,
    preconditioner_of_step,
    predicted_update,
    read_before_step,
)
from trl_entropy.estimators.attribution.shares import on_policy_coefficients, token_contributions
from trl_entropy.estimators.control.entropy_control import (
    Correction,
    Vector,
    control_products,
    correction,
    floored_metric,
    mean_of,
)
from trl_entropy.estimators.control.token_control import (
    centred_covariances,
    clip_cov_tokens,
    kl_cov_tokens,
    num_chosen,
    random_positive_tokens,
    random_tokens,
    token_covariances,
)
from trl_entropy.experiments.state import FixedState
from trl_entropy.gradients.scores import TokenScores
from trl_entropy.gradients.sequence_products import Value, gradients_of, weighted_entropies, weighted_logps
from trl_entropy.rollouts.batch import RolloutBatch
from trl_entropy.rollouts.completions import Completions

LOWER_LR = 0.5
BONUSES = (0.003, 0.01, 0.03)  # TRL's entropy_coef
FRACTIONS = (0.02, 0.1)  # of the step's tokens, which Clip-Cov leaves out
QUANTILES = (0.8, 1.0)  # of the covariances; Clip-Cov takes tokens between the two
TARGET_CHANGES = {
    "entropy_control 0": 0.0,
    "entropy_control 1/2": 0.5,
}  # the share of the predicted change that remains

# (covariances, advantages by token, mask, number of tokens, uniform numbers) -> the tokens left out of the loss
Choice = Callable[[Tensor, Tensor, Tensor, int, Tensor], Tensor]
# The other two take as many tokens as clip_cov finds.
CHOICES: dict[str, Choice] = {
    "clip_cov": lambda covs, adv, mask, count, order: clip_cov_tokens(covs, QUANTILES, count, order, True),
    "random": lambda covs, adv, mask, count, order: random_tokens(mask, count, order),
    "random_positive": lambda covs, adv, mask, count, order: random_positive_tokens(mask, adv, count, order),
}
# By what the tokens are ranked of which as many are left out, the largest first. `attribution`: the entropy that a
# token loses, by grad h of the completions that the entropy control takes (T9). No setting of training offers it: it
# leaves out what earns the reward.
RANKED = ("largest_cov", "centred_cov", "attribution")
METHODS = (
    "none",
    f"lower_lr {LOWER_LR:g}",
    *(f"bonus {coefficient:g}" for coefficient in BONUSES),
    *(f"{name} {fraction:g}" for name in (*CHOICES, *RANKED) for fraction in FRACTIONS),
    *TARGET_CHANGES,
)

# Methods whose true changes are measured as well.
MEASURED = ("none", "lower_lr 0.5", "bonus 0.03", "clip_cov 0.1", *TARGET_CHANGES)


class MadeStep(NamedTuple):
    """
    A method's step from one redraw.

    Attributes:
        update: by parameter name.
        departure: length of its difference from the step without control, over the length of that step, both in the
            metric M^-1 (T19).
        num_tokens: tokens left out of the loss.
        infeasible: whether the cap of the entropy control limited the correction.
    """

    update: Vector
    departure: float
    num_tokens: int
    infeasible: bool


def steps_of_methods(
    state: FixedState, rollouts: RolloutBatch, probe: Completions, seed: int, batch_size: int
) -> dict[str, MadeStep]:
    """
    Each method's step by AdamW (T4) from the checkpoint's moments and the same rollouts, clipped by the norm of the
    method's own gradient.

    Args:
        state: the checkpoint.
        rollouts: of one step, on-policy and in one micro-batch, so that TRL's bonus is a mean over all their tokens.
        probe: independent completions on which the entropy control and `attribution` take grad h.
        seed: for the tokens that are chosen at random.
        batch_size: completions differentiated at a time.
    """
    args, size = state.args, state.args.probe_batch_size
    halves = score_prompt_halves(state.engine, state.before, probe, args.temperature, size)
    of_entropy = half_gradients(state.engine, state.before, halves, args.temperature, size)
    gradients, counts = loss_gradients(state, rollouts, mean_of(of_entropy), seed, batch_size)
    contexts = {method: context_of(state, gradient) for method, gradient in gradients.items()}
    updates = {method: predicted_update(context) for method, context in contexts.items()}
    plain, metric = updates["none"], preconditioner_of_step(contexts["none"])
    metric = floored_metric(metric, DEFAULT_METRIC_FLOOR)
    updates[f"lower_lr {LOWER_LR:g}"] = {name: LOWER_LR * d for name, d in plain.items()}
    asked = entropy_corrections(contexts["none"], plain, metric, of_entropy)
    updates |= {method: {n: d + change[n] for n, d in plain.items()} for method, (change, _) in asked.items()}
    length = _length(plain, metric)
    return {
        method: MadeStep(
            updates[method],
            _length({name: updates[method][name] - d for name, d in plain.items()}, metric) / length,
            counts.get(method, 0),
            method in asked and asked[method][1].infeasible,
        )
        for method in METHODS
    }


def loss_gradients(
    state: FixedState, rollouts: RolloutBatch, of_entropy: Vector, seed: int, batch_size: int
) -> tuple[dict[str, Vector], dict[str, int]]:
    """
    The loss gradient of every method that changes it, and how many tokens each method leaves out; `of_entropy` is grad
    h of other completions.
    """
    completions, temperature = Completions.of(rollouts), state.args.temperature
    mask, num_rows = rollouts.loss_mask.bool(), len(rollouts.rewards)
    advantages = rollouts.advantages.reshape(num_rows, -1).expand(mask.shape)

    def loss(left_out: Bool[Tensor, "B T"]) -> Value:
        kept = advantages.where(~left_out, 0.0)
        return weighted_logps(-on_policy_coefficients(kept, mask, num_rows, state.args.max_completion_length))

    scores = state.score(completions, batch_size)
    chosen = chosen_tokens(scores.logps[0], rollouts, seed)
    losses = entropy_losses(state, completions, advantages, of_entropy, batch_size)
    chosen |= ranked_tokens(scores, losses, rollouts, chosen)
    with state.engine.scoring_model(state.before) as model:
        values = [loss(torch.zeros_like(mask)), weighted_entropies(mask / mask.sum()), *map(loss, chosen.values())]
        plain, entropy, *others = gradients_of(model, completions, values, temperature, batch_size)
    gradients = {"none": plain, **dict(zip(chosen, others, strict=True))}
    for coefficient in BONUSES:
        gradients[f"bonus {coefficient:g}"] = {n: g - coefficient * entropy[n] for n, g in plain.items()}
    return gradients, {method: int(tokens.sum()) for method, tokens in chosen.items()}


def chosen_tokens(logps: Float[Tensor, "B T"], rollouts: RolloutBatch, seed: int) -> dict[str, Bool[Tensor, "B T"]]:
    """The tokens that each method leaves out; the others leave out as many as Clip-Cov finds."""
    mask = rollouts.loss_mask.bool()
    covariances = token_covariances(logps, rollouts.advantages, mask)
    advantages = rollouts.advantages.reshape(len(mask), -1).expand(mask.shape)
    generator = torch.Generator().manual_seed(seed)
    chosen = {}
    for fraction in FRACTIONS:
        count = num_chosen(mask, fraction)
        for name, choice in CHOICES.items():
            order = torch.rand(mask.shape, generator=generator, dtype=torch.float64).to(mask.device)
            tokens = choice(covariances, advantages, mask, count, order)
            count = int(tokens.sum()) if name == "clip_cov" else count
            chosen[f"{name} {fraction:g}"] = tokens
    return chosen


def entropy_losses(
    state: FixedState, completions: Completions, advantages: Float[Tensor, "B T"], of_entropy: Vector, batch_size: int
) -> Float[Tensor, "B T"]:
    """-delta_ik of (T9) up to a factor, with the metric from before the step, floored as in (T19)."""
    metric = floored_metric(preconditioner_before(state.context), DEFAULT_METRIC_FLOOR)
    direction = {name: (m * of_entropy[name]).to(m.dtype) for name, m in metric.items()}
    slopes = state.score(completions, batch_size, direction=direction, order=1).logps[1]
    return -token_contributions(advantages.double(), slopes, completions.loss_mask, 1.0)


def ranked_tokens(
    scores: TokenScores,
    losses: Float[Tensor, "B T"],
    rollouts: RolloutBatch,
    chosen: dict[str, Bool[Tensor, "B T"]],
) -> dict[str, Bool[Tensor, "B T"]]:
    """The tokens that each method of [`RANKED`] leaves out, as many as Clip-Cov has `chosen`."""
    mask, logps, advantages = rollouts.loss_mask.bool(), scores.logps[0], rollouts.advantages
    values = dict(zip(RANKED, (
        token_covariances(logps, advantages, mask),
        centred_covariances(logps, scores.entropy[0], advantages, mask),
        losses.where(mask, math.nan),
    ), strict=True))  # fmt: skip
    return {
        f"{name} {fraction:g}": kl_cov_tokens(value, int(chosen[f"clip_cov {fraction:g}"].sum()))
        for name, value in values.items()
        for fraction in FRACTIONS
    }


def context_of(state: FixedState, gradient: Vector) -> UpdateContext:
    """The `UpdateContext` of AdamW's step with this gradient; `.grad` is put back afterwards."""
    parameters = state.engine.parameters
    kept = {name: parameter.grad for name, parameter in parameters.items()}
    try:
        for name, parameter in parameters.items():
            parameter.grad = gradient[name]
        context = UpdateContext(state.engine)
        read_before_step(context)
    finally:
        for name, parameter in parameters.items():
            parameter.grad = kept[name]
    return context


def entropy_corrections(
    context: UpdateContext, step: Vector, metric: Vector, gradients: tuple[Vector, Vector]
) -> dict[str, tuple[Vector, Correction]]:
    """What [`EntropyControl`] adds to the step for each change asked of it (T19), and its `Correction`."""
    products, g = control_products(gradients, step, metric, context.gradient), mean_of(gradients)
    found = {}
    for method, share in TARGET_CHANGES.items():
        asked = correction(products, share * products.change, floor=False, cap=DEFAULT_CAP)
        change = {name: (asked.multiplier * m * g[name]).to(m.dtype) for name, m in metric.items()}
        found[method] = change, asked
    return found


def _length(vector: Vector, metric: Vector) -> float:
    """The length in the metric M^-1, over the coordinates with M > 0."""
    return math.sqrt(sum(float((vector[n].double().square() / m)[m > 0].sum()) for n, m in metric.items()))
