"""The steps that the methods of entropy control make from one redraw of the rollouts, at a fixed state."""

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
from trl_entropy.engine.adamw_step import preconditioner_of_step, predicted_update, read_before_step
from trl_entropy.estimators.attribution.shares import on_policy_coefficients
from trl_entropy.estimators.control.entropy_control import (
    Correction,
    Vector,
    budget_products,
    correction,
    floored_metric,
    mean_of,
)
from trl_entropy.estimators.control.token_control import (
    clip_cov_tokens,
    num_chosen,
    random_positive_tokens,
    random_tokens,
    token_covariances,
)
from trl_entropy.experiments.state import FixedState
from trl_entropy.gradients.scores import score
from trl_entropy.gradients.sequence_products import Value, gradients_of, weighted_entropies, weighted_logps
from trl_entropy.rollouts.batch import RolloutBatch
from trl_entropy.rollouts.completions import Completions

LOWER_LR = 0.5
BONUSES = (0.003, 0.01, 0.03)  # TRL's entropy_coef
FRACTIONS = (0.02, 0.1)  # of the step's tokens that Clip-Cov leaves out
QUANTILES = (0.8, 1.0)  # of the covariances, between which it takes them
BUDGETS = {"entropy_control 0": 0.0, "entropy_control 1/2": 0.5}  # share of the predicted change that is left

# (covariances, advantages by token, mask, tokens to take, uniform numbers) -> the tokens that are left out of the loss
Choice = Callable[[Tensor, Tensor, Tensor, int, Tensor], Tensor]
# The others take as many tokens as clip_cov finds.
CHOICES: dict[str, Choice] = {
    "clip_cov": lambda covs, adv, mask, count, order: clip_cov_tokens(covs, QUANTILES, count, order, True),
    "random": lambda covs, adv, mask, count, order: random_tokens(mask, count, order),
    "random_positive": lambda covs, adv, mask, count, order: random_positive_tokens(mask, adv, count, order),
}
METHODS = (
    "none",
    f"lower_lr {LOWER_LR:g}",
    *(f"bonus {coefficient:g}" for coefficient in BONUSES),
    *(f"{name} {fraction:g}" for name in CHOICES for fraction in FRACTIONS),
    *BUDGETS,
)

# Those whose true changes are measured as well.
MEASURED = ("none", "lower_lr 0.5", "bonus 0.03", "clip_cov 0.1", *BUDGETS)


class MadeStep(NamedTuple):
    """
    A method's step from one redraw.

    Attributes:
        update: by parameter name.
        departure: length of its difference from the step of no control, over that step's, both in M^-1 (T19).
        num_tokens: left out of the loss.
        infeasible: whether the cap of the entropy control bound.
    """

    update: Vector
    departure: float
    num_tokens: int
    infeasible: bool


def steps_of_methods(
    state: FixedState, rollouts: RolloutBatch, probe: Completions, seed: int, batch_size: int
) -> dict[str, MadeStep]:
    """
    Each method's step by AdamW (T4) from the checkpoint's moments and the same rollouts, clipped by its own norm.

    Args:
        state: the checkpoint.
        rollouts: of one step, on-policy, one micro-batch, so that TRL's bonus is a mean over all their tokens.
        probe: independent completions, of which the entropy control takes grad h.
        seed: of the tokens that are chosen at random.
        batch_size: completions differentiated at a time.
    """
    gradients, counts = loss_gradients(state, rollouts, seed, batch_size)
    contexts = {method: context_of(state, gradient) for method, gradient in gradients.items()}
    updates = {method: predicted_update(context) for method, context in contexts.items()}
    plain, metric = updates["none"], preconditioner_of_step(contexts["none"])
    metric = floored_metric(metric, DEFAULT_METRIC_FLOOR)
    updates[f"lower_lr {LOWER_LR:g}"] = {name: LOWER_LR * d for name, d in plain.items()}
    asked = budget_corrections(state, contexts["none"], plain, metric, probe)
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
    state: FixedState, rollouts: RolloutBatch, seed: int, batch_size: int
) -> tuple[dict[str, Vector], dict[str, int]]:
    """The gradient of the loss of every method that changes it, and how many tokens each leaves out."""
    completions, temperature = Completions.of(rollouts), state.args.temperature
    mask, num_rows = rollouts.completion_mask.bool(), len(rollouts.rewards)
    advantages = rollouts.advantages.reshape(num_rows, -1).expand(mask.shape)

    def loss(left_out: Bool[Tensor, "B T"]) -> Value:
        kept = advantages.where(~left_out, 0.0)
        return weighted_logps(-on_policy_coefficients(kept, mask, num_rows, state.args.max_completion_length))

    with state.engine.scoring_model(state.before) as model:
        logps = score(model, completions, temperature, batch_size).logps[0]
        chosen = chosen_tokens(logps, rollouts, seed)
        values = [loss(torch.zeros_like(mask)), weighted_entropies(mask / mask.sum()), *map(loss, chosen.values())]
        plain, entropy, *others = gradients_of(model, completions, values, temperature, batch_size)
    gradients = {"none": plain, **dict(zip(chosen, others, strict=True))}
    for coefficient in BONUSES:
        gradients[f"bonus {coefficient:g}"] = {n: g - coefficient * entropy[n] for n, g in plain.items()}
    return gradients, {method: int(tokens.sum()) for method, tokens in chosen.items()}


def chosen_tokens(logps: Float[Tensor, "B T"], rollouts: RolloutBatch, seed: int) -> dict[str, Bool[Tensor, "B T"]]:
    """Which tokens each method leaves out; the other choices take as many as Clip-Cov found."""
    mask = rollouts.completion_mask.bool()
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


def context_of(state: FixedState, gradient: Vector) -> UpdateContext:
    """All that AdamW's step by this gradient is made of; leaves `.grad` as it was."""
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


def budget_corrections(
    state: FixedState, context: UpdateContext, step: Vector, metric: Vector, probe: Completions
) -> dict[str, tuple[Vector, Correction]]:
    """What [`EntropyControl`] adds to the step for each budget (T19), in its floored metric, and how it came about."""
    args, size = state.args, state.args.probe_batch_size
    halves = score_prompt_halves(state.engine, state.before, probe, args.temperature, size)
    gradients = half_gradients(state.engine, state.before, halves, args.temperature, size)
    products, g = budget_products(gradients, step, metric, context.gradient), mean_of(gradients)
    found = {}
    for method, share in BUDGETS.items():
        asked = correction(products, share * products.change, floor=False, cap=DEFAULT_CAP)
        change = {name: (asked.multiplier * m * g[name]).to(m.dtype) for name, m in metric.items()}
        found[method] = change, asked
    return found


def _length(vector: Vector, metric: Vector) -> float:
    """In M^-1, over live coordinates."""
    return math.sqrt(sum(float((vector[n].double().square() / m)[m > 0].sum()) for n, m in metric.items()))
