"""An optimizer's step (T4), (T5) from an `UpdateContext`: the update, its parts, and the metric of the gradient."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import Tensor

from trl_entropy.engine.context import UpdateContext
from trl_entropy.estimators.optimizer.adamw import AdamWSettings, UpdateParts

ByName = dict[str, Tensor]


def adamw_settings(update: UpdateContext) -> dict[str, AdamWSettings]:
    """AdamW's settings of each parameter at this step. Raises `ValueError` for another optimizer."""
    update.check_adamw()
    lr, betas, eps, decay = update.learning_rate, update.betas, update.eps, update.weight_decay
    return {name: AdamWSettings(lr[name], betas[name], eps[name], decay[name]) for name in lr}


def predicted_update(update: UpdateContext) -> ByName:
    """dtheta by equation (T4), before the optimizer makes it. Collective."""
    return {name: sum(parts) for name, parts in _parts(update, update.gradient)}


def update_parts(update: UpdateContext) -> Iterator[tuple[str, UpdateParts]]:
    """The parts of the update (T5), by parameter, without those that the step does not change. Collective."""
    return _parts(update, [name for name in update.gradient if name not in update.without_gradient])


def metric_of_step(update: UpdateContext) -> ByName:
    """
    lr c (1-b1)/(1-b1^t) M of (T4) by parameter, M with this step's gradient; in general coefficient M of (T5).
    Collective.

    0 where every gradient so far was 0.
    """
    rule, step, clip = update.rule, update.step_of_rule, update.clip_factor
    metric = preconditioner_of_step(update)
    return {name: rule.coefficient(step, update.options[name], clip) * m for name, m in metric.items()}


def preconditioner_of_step(update: UpdateContext) -> ByName:
    """M of (T5) by parameter, with this step's gradient; 0 where every gradient so far was 0. Collective."""
    rule, step, clip = update.rule, update.step_of_rule, update.clip_factor
    gradient, params, groups = update.gradient, update.params_before, update.options
    states, metric = update.optimizer_state(rule.metric_keys), {}
    for name, g in gradient.items():
        after = rule.advanced(states[name], g * clip, params[name], step, groups[name])
        metric[name] = rule.metric(after, g, step, groups[name])
    return metric


def has_metric_before(update: UpdateContext) -> bool:
    """Whether the optimizer has a metric before the step, which most have from their second step on."""
    return not update.rule.counts_steps or update.optimizer_step > 1


def preconditioner_before(update: UpdateContext) -> ByName:
    """M before the step (T16), (T17), without its gradient; 0 where every gradient so far was 0. Collective."""
    rule, step, groups = update.rule, update.step_of_rule - 1, update.options
    states = update.optimizer_state(rule.metric_keys)
    return {name: rule.metric(states[name], like, step, groups[name]) for name, like in update.gradient.items()}


def metric_before(update: UpdateContext) -> ByName:
    """lr c (1-b1)/(1-b1^t) M by parameter, with M from before the step (T17). Collective."""
    coefficients = coefficients_of_step(update)
    return {name: coefficients[name] * m for name, m in preconditioner_before(update).items()}


def coefficient_of_step(update: UpdateContext) -> float:
    """
    lr c (1-b1)/(1-b1^t), or another rule's number, by which -M g enters the update (T5). Collective.

    Raises:
        ValueError: if parameter groups differ in it.
    """
    found = set(coefficients_of_step(update).values())
    if len(found) > 1:
        raise ValueError(
            f"parameter groups have {len(found)} different learning rates or betas, and (T12) needs one: give all "
            "groups the same, or turn fisher_probe off"
        )
    return found.pop()


def coefficients_of_step(update: UpdateContext) -> dict[str, float]:
    """The same of each parameter. Collective."""
    step, clip = update.step_of_rule, update.clip_factor
    return {name: update.rule.coefficient(step, group, clip) for name, group in update.options.items()}


def read_before_step(update: UpdateContext) -> None:
    """Reads all that (T4) needs, so that `update` keeps it when the optimizer overwrites it. Collective."""
    _ = update.rule, update.step_of_rule, update.without_gradient, update.clip_factor
    _ = update.gradient, update.optimizer_state(update.rule.keys), update.params_before


def _parts(update: UpdateContext, names: Iterable[str]) -> Iterator[tuple[str, UpdateParts]]:
    rule, clip, step = update.rule, update.clip_factor, update.step_of_rule
    params, gradient, states = update.params_before, update.gradient, update.optimizer_state(rule.keys)
    for name in names:
        yield name, rule.parts(states[name], gradient[name], params[name], step, update.options[name], clip)
