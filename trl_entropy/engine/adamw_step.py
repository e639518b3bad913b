"""AdamW's step (T4) from an `UpdateContext`: the update, its parts, and the metric that multiplies the gradient."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from trl_entropy.engine.context import UpdateContext
from trl_entropy.estimators.optimizer.adamw import (
    AdamWSettings,
    UpdateParts,
    adamw_moments,
    adamw_update,
    adamw_update_parts,
    gradient_coefficient,
    gradient_metric,
    live_preconditioner,
)

ByName = dict[str, Tensor]


def adamw_settings(update: UpdateContext) -> dict[str, AdamWSettings]:
    """AdamW's settings of each parameter at this step."""
    lr, betas, eps, decay = update.learning_rate, update.betas, update.eps, update.weight_decay
    return {name: AdamWSettings(lr[name], betas[name], eps[name], decay[name]) for name in lr}


def predicted_update(update: UpdateContext) -> ByName:
    """dtheta by equation (T4), before the optimizer makes it. Collective."""
    update.check_adamw()
    settings, clip, step = adamw_settings(update), update.clip_factor, update.optimizer_step
    params, gradient = update.params_before, update.gradient
    exp_avg, exp_avg_sq = update.exp_avg, update.exp_avg_sq
    return {
        name: adamw_update(params[name], gradient[name], exp_avg[name], exp_avg_sq[name], step, settings[name], clip)
        for name in gradient
    }


def update_parts(update: UpdateContext) -> Iterator[tuple[str, UpdateParts]]:
    """The parts of the update (T5), by parameter, without those that the step does not change. Collective."""
    settings, clip, step = adamw_settings(update), update.clip_factor, update.optimizer_step
    params, gradient = update.params_before, update.gradient
    exp_avg, exp_avg_sq = update.exp_avg, update.exp_avg_sq
    for name in gradient:
        if name in update.without_gradient:
            continue
        ingredients = params[name], gradient[name], exp_avg[name], exp_avg_sq[name]
        yield name, adamw_update_parts(*ingredients, step, settings[name], clip)


def metric_of_step(update: UpdateContext) -> ByName:
    """
    lr c (1-b1)/(1-b1^t) M of (T4) by parameter, M with this step's gradient. Collective.

    0 where every gradient so far was 0.
    """
    settings, step, clip = adamw_settings(update), update.optimizer_step, update.clip_factor
    gradient, exp_avg_sq = update.gradient, update.exp_avg_sq
    return {name: gradient_metric(gradient[name], exp_avg_sq[name], step, settings[name], clip) for name in gradient}


def preconditioner_of_step(update: UpdateContext) -> ByName:
    """M of (T4) by parameter, with this step's gradient; 0 where every gradient so far was 0. Collective."""
    settings, step, clip = adamw_settings(update), update.optimizer_step, update.clip_factor
    gradient, exp_avg, exp_avg_sq = update.gradient, update.exp_avg, update.exp_avg_sq
    metric = {}
    for name, s in settings.items():
        _, exp_avg_sq_after = adamw_moments(gradient[name], exp_avg[name], exp_avg_sq[name], s.betas, clip)
        metric[name] = live_preconditioner(exp_avg_sq_after, step, s.betas[1], s.eps)
    return metric


def coefficient_of_step(update: UpdateContext) -> float:
    """
    lr c (1-b1)/(1-b1^t), by which -M g enters the update (T5). Collective.

    Raises:
        ValueError: if parameter groups differ in it.
    """
    step, clip = update.optimizer_step, update.clip_factor
    found = {gradient_coefficient(settings, step, clip) for settings in adamw_settings(update).values()}
    if len(found) > 1:
        raise ValueError(
            f"parameter groups have {len(found)} different learning rates or betas, and (T12) needs one: give all "
            "groups the same, or turn fisher_probe off"
        )
    return found.pop()


def read_before_step(update: UpdateContext) -> None:
    """Reads all that (T4) needs, so that `update` keeps it when the optimizer overwrites it. Collective."""
    update.check_adamw()
    _ = update.optimizer_step, update.without_gradient, update.clip_factor
    _ = update.gradient, update.exp_avg, update.exp_avg_sq, update.params_before
