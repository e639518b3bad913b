"""
What does the optimizer's conditioning do to the entropy? One gradient, one state, five rules of stepping.

    trl-entropy experiment conditioning --checkpoint RUN/checkpoint-N

SGD, RMSprop and AdamW with and without momentum step from the checkpoint by the same gradient and moments, at the
run's learning rate, and at the length of AdamW's step. Of each: the entropy change (T7), (T8), the shares of momentum,
weight decay and gradient, and the cosine with grad h and with M grad h.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from trl_entropy.engine.adamw_step import adamw_settings, metric_of_step
from trl_entropy.estimators.optimizer.adamw import AdamWSettings, UpdateParts, adamw_moments, adamw_update_parts
from trl_entropy.experiments.along import changes_at, columns_along, points_of, sample_size_at
from trl_entropy.experiments.command import Command, with_interval
from trl_entropy.experiments.redraws import Cache, pool_completions
from trl_entropy.experiments.state import FixedState
from trl_entropy.gradients.scores import score
from trl_entropy.gradients.sequence_products import entropy_gradient
from trl_entropy.probes.rollout_entropy import flat
from trl_entropy.rollouts.completions import Completions

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# (theta, clipped gradient, exp_avg, exp_avg_sq before the step, t, settings) -> the step's parts
Rule = Callable[[Tensor, Tensor, Tensor, Tensor, int, AdamWSettings], UpdateParts]


def _sgd(param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, t: int, s: AdamWSettings) -> UpdateParts:
    return UpdateParts(torch.zeros_like(grad), torch.zeros_like(grad), -s.lr * grad)


def _sgd_momentum(
    param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, t: int, s: AdamWSettings
) -> UpdateParts:
    """Along Adam's own average of gradients."""
    beta, correction = s.betas[0], 1 - s.betas[0] ** t
    gradient = -s.lr * (1 - beta) / correction * grad
    return UpdateParts(-s.lr * beta / correction * exp_avg, torch.zeros_like(grad), gradient)


def _rmsprop(
    param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, t: int, s: AdamWSettings
) -> UpdateParts:
    """torch's: no bias correction, no decay."""
    _, after = adamw_moments(grad, exp_avg, exp_avg_sq, s.betas)
    return UpdateParts(torch.zeros_like(grad), torch.zeros_like(grad), -s.lr * grad / (after.sqrt() + s.eps))


def _adamw_without_momentum(
    param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, t: int, s: AdamWSettings
) -> UpdateParts:
    return adamw_update_parts(
        param, grad, exp_avg, exp_avg_sq, t, AdamWSettings(s.lr, (0.0, s.betas[1]), s.eps, s.weight_decay)
    )


RULES: dict[str, Rule] = {
    "SGD": _sgd,
    "SGD, momentum": _sgd_momentum,
    "RMSprop": _rmsprop,
    "AdamW, b1 = 0": _adamw_without_momentum,
    "AdamW": adamw_update_parts,
}


def steps(state: FixedState) -> dict[str, UpdateParts]:
    """Each rule's parts, flat, at the run's learning rate."""
    context, settings, names = state.context, adamw_settings(state.context), list(state.engine.parameters)
    found = {}
    for label, rule in RULES.items():
        columns = [
            rule(
                state.before[name],
                context.gradient[name] * context.clip_factor,
                context.exp_avg[name],
                context.exp_avg_sq[name],
                context.optimizer_step,
                settings[name],
            )
            for name in names
        ]
        found[label] = UpdateParts(
            *(torch.cat([part.flatten() for part in column]) for column in zip(*columns, strict=True))
        )
    return found


def half_gradients(state: FixedState, probe: Completions, entropy: float, batch_size: int) -> Float[Tensor, "2 D"]:
    """grad h from each half of E on its own: their product is free of the noise that a square has."""
    halves = []
    with state.engine.scoring_model(state.before) as model:
        for rows in torch.arange(len(probe)).chunk(2):
            part = probe.rows(rows)
            gradient = entropy_gradient(
                model, part, state.args.temperature, batch_size, entropy, float(part.lengths.sum())
            )
            halves.append(flat(gradient, list(state.engine.parameters)))
    return torch.stack(halves)


def alignment(direction: Float[Tensor, " D"], halves: Float[Tensor, "2 D"]) -> float:
    """
    Cosine of a direction with the gradient of which `halves` are two independent estimates.

    Its square in the denominator is the product of the two: unbiased, where the square of their mean would be too
    large by its noise. nan where that product is negative: too few completions.
    """
    first, second = halves.double()
    direction = direction.double()
    along = direction @ (first + second) / 2
    return float(along / direction.norm() / torch.sqrt(first @ second))


def by_name(state: FixedState, flat_values: Float[Tensor, " D"]) -> dict[str, Tensor]:
    """Inverse of `flat`."""
    pieces = flat_values.split([value.numel() for value in state.before.values()])
    return {name: p.view_as(value) for (name, value), p in zip(state.before.items(), pieces, strict=True)}


def compute(state: FixedState, cache: Cache, options: argparse.Namespace) -> dict[str, Any]:
    """Everything but the output."""
    number, batch_size = options.num_completions, options.batch_size
    probe = pool_completions(state, number, options.seed, 0)
    with state.engine.scoring_model(state.before) as model:
        scores = score(model, probe, state.args.temperature, batch_size)
    entropy = float(scores.entropy[0].double().sum() / probe.lengths.sum())
    halves = cache.get(f"half-gradients-{number}", lambda: half_gradients(state, probe, entropy, batch_size))
    metric = flat(metric_of_step(state.context), list(state.engine.parameters))
    all_parts = steps(state)
    length = float(sum(all_parts["AdamW"]).double().norm())
    rows, prompts = [], torch.arange(number)
    for label, parts in all_parts.items():
        step = sum(parts)
        own_length = float(step.double().norm())
        row: dict[str, Any] = {"rule": label, "length": own_length, **_shares(parts, halves.mean(0))}
        row |= {"cosine_grad_h": alignment(step, halves), "cosine_M_grad_h": alignment(step, metric * halves)}
        factors = 1.0, length / own_length
        key = f"conditioning-{number}-{label.replace(' ', '')}"
        direction = by_name(state, step)
        columns = cache.get(key, partial(columns_along, state, probe, direction, factors, 1, batch_size))
        start, points = points_of(columns, len(factors))
        for at, factor, there in zip(("equal_lr", "equal_length"), factors, points, strict=True):
            found = {n: c.estimate(prompts).as_dict() for n, c in changes_at(start, there, factor).items()}
            row[at] = {"scale": factor, "importance_ess": sample_size_at(start, there), **found}
        rows.append(row)
    return {"num_completions": number, "policy_entropy": entropy, "rows": rows}


def _shares(parts: UpdateParts, gradient: Float[Tensor, " D"]) -> dict[str, float]:
    """Of momentum, weight decay and gradient in the first-order change."""
    products = torch.stack([part.double() @ gradient.double() for part in parts])
    return {f"share_{n}": float(v) + 0.0 for n, v in zip(UpdateParts._fields, products / products.sum(), strict=True)}


def table(result: dict[str, Any]) -> str:
    """The result as text; changes in units of 1e-3 nats per token."""
    lines = [
        "| rule | length | true, equal lr | true, equal length | first order, equal length | momentum | decay | "
        "cos grad h | cos M grad h |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        lr, same = row["equal_lr"], row["equal_length"]
        lines.append(
            f"| {row['rule']} | {row['length']:.3g} | {with_interval(lr['measured'], 1e3)} | "
            f"{with_interval(same['measured'], 1e3)} | {with_interval(same['linear'], 1e3)} | "
            f"{row['share_momentum']:.2f} | {row['share_weight_decay']:.2f} | "
            f"{row['cosine_grad_h']:+.4f} | {row['cosine_M_grad_h']:+.4f} |"
        )
    return "\n".join([*lines, f"\nx 1e-3 nats/token, 95 % intervals, {result['num_completions']} completions"])


def draw(result: dict[str, Any], left: Axes, right: Axes) -> None:
    """True change at equal length, and both cosines."""
    from trl_entropy.analysis.plots import BLUE, GREY, ORANGE

    places = range(len(result["rows"]))
    for y, row in zip(places, result["rows"], strict=True):
        entry = row["equal_length"]["measured"]
        left.errorbar(1e3 * entry["value"], y, xerr=1.96e3 * entry["stderr"], fmt="o", color=BLUE, capsize=3)
        for name, color in (("cosine_grad_h", BLUE), ("cosine_M_grad_h", ORANGE)):
            right.plot(row[name] if math.isfinite(row[name]) else 0, y, "o", color=color)
    left.set(xlabel="entropy change at equal length, 1e-3 nats/token, 95 %")
    right.set(xlabel="cosine with grad h (blue), M grad h (orange)")
    for axes in (left, right):
        axes.axvline(0, color=GREY, lw=0.8)
        axes.set_yticks(places, [row["rule"] for row in result["rows"]])
        axes.invert_yaxis()


COMMAND = Command(
    "conditioning",
    "What does the optimizer's conditioning do to the entropy? One gradient, one state, five rules of stepping.",
    {"num_completions": (1024, 64, "completions that the changes are measured on")},
    compute,
    table,
    draw,
)
main = COMMAND.main
