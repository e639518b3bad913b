"""
What does the optimizer's preconditioning do to the entropy? One gradient and one state, five update rules.

    trl-entropy experiment conditioning --checkpoint RUN/checkpoint-N

SGD and AdamW, each with and without momentum, and RMSprop make a step from the checkpoint with the same gradient and
the same moments: at the run's learning rate, and scaled to the length of AdamW's step. For each step the table has the
entropy change (T7), (T8), the shares of momentum, weight decay and gradient in it, and the cosines of the step with
grad h and with M grad h.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, TypedDict

import torch
from jaxtyping import Float
from torch import Tensor

from trl_entropy.engine.optimizer_step import adamw_settings, metric_of_step
from trl_entropy.estimators.optimizer.adamw import AdamWSettings, UpdateParts, adamw_moments, adamw_update_parts
from trl_entropy.experiments.along import changes_at, columns_along, points_of, sample_size_at
from trl_entropy.experiments.command import Command
from trl_entropy.experiments.output import Numbers, with_interval
from trl_entropy.experiments.redraws import Cache, pool_and_entropy
from trl_entropy.experiments.state import FixedState
from trl_entropy.gradients.group_gradients import flat
from trl_entropy.gradients.sequence_products import entropy_gradient
from trl_entropy.rollouts.completions import Completions

if TYPE_CHECKING:
    from matplotlib.axes import Axes


class AtScale(TypedDict):
    """Changes by a step times `scale`, nats per token with errors; `error_linear` is first order less the true one."""

    scale: float
    importance_ess: float
    measured: Numbers
    linear: Numbers
    error_linear: Numbers


class Row(TypedDict):
    """One rule's step: its length, shares of the first-order change, alignment, and changes at two lengths."""

    rule: str
    length: float
    share_momentum: float
    share_weight_decay: float
    share_gradient: float
    cosine_grad_h: float
    cosine_M_grad_h: float
    equal_lr: AtScale
    equal_length: AtScale


class Result(TypedDict):
    """What `conditioning.json` holds."""

    num_completions: int
    policy_entropy: float
    rows: list[Row]


# (theta, clipped gradient, exp_avg, exp_avg_sq before the step, t, settings) -> the step's parts
Rule = Callable[[Tensor, Tensor, Tensor, Tensor, int, AdamWSettings], UpdateParts]


def _sgd(param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, t: int, s: AdamWSettings) -> UpdateParts:
    return UpdateParts(torch.zeros_like(grad), torch.zeros_like(grad), -s.lr * grad)


def _sgd_momentum(
    param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, t: int, s: AdamWSettings
) -> UpdateParts:
    """SGD along Adam's bias-corrected average of gradients."""
    beta, correction = s.betas[0], 1 - s.betas[0] ** t
    gradient = -s.lr * (1 - beta) / correction * grad
    return UpdateParts(-s.lr * beta / correction * exp_avg, torch.zeros_like(grad), gradient)


def _rmsprop(
    param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, t: int, s: AdamWSettings
) -> UpdateParts:
    """As in torch: without bias correction and without weight decay."""
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
    """The parts of each rule's step at the run's learning rate, each as one flat vector."""
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
    """grad h estimated from each half of E. The product of the two is unbiased, where a square would hold noise."""
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
    Cosine of a direction with a gradient, from two independent estimates `halves` of that gradient.

    The squared length of the gradient is estimated without bias by the product of the two; the square of their mean
    would be too large by its noise. nan if that product is negative, which says that there are too few completions.
    """
    first, second = halves.double()
    direction = direction.double()
    along = direction @ (first + second) / 2
    return float(along / direction.norm() / torch.sqrt(first @ second))


def by_name(state: FixedState, flat_values: Float[Tensor, " D"]) -> dict[str, Tensor]:
    """The vectors by parameter name of a flat one: the inverse of `flat`."""
    pieces = flat_values.split([value.numel() for value in state.before.values()])
    return {name: p.view_as(value) for (name, value), p in zip(state.before.items(), pieces, strict=True)}


def compute(state: FixedState, cache: Cache, options: argparse.Namespace) -> Result:
    """Every rule's step, and what it does to the entropy."""
    number, batch_size = options.num_completions, options.batch_size
    probe, entropy = pool_and_entropy(state, number, options.seed, batch_size)
    halves = cache.get(f"half-gradients-{number}", lambda: half_gradients(state, probe, entropy, batch_size))
    metric = flat(metric_of_step(state.context), list(state.engine.parameters))
    all_parts = steps(state)
    length = float(sum(all_parts["AdamW"]).double().norm())
    rows: list[Row] = []
    for label, parts in all_parts.items():
        step = sum(parts)
        own_length = float(step.double().norm())
        momentum, weight_decay, gradient = _shares(parts, halves.mean(0))
        factors = 1.0, length / own_length
        key = f"conditioning-{number}-{label.replace(' ', '')}"
        direction = by_name(state, step)
        columns = cache.get(key, partial(columns_along, state, probe, direction, factors, 1, batch_size))
        equal_lr, equal_length = _at_scales(columns, factors)
        rows.append({
            "rule": label, "length": own_length, "share_momentum": momentum,
            "share_weight_decay": weight_decay, "share_gradient": gradient,
            "cosine_grad_h": alignment(step, halves), "cosine_M_grad_h": alignment(step, metric * halves),
            "equal_lr": equal_lr, "equal_length": equal_length,
        })  # fmt: skip
    return {"num_completions": number, "policy_entropy": entropy, "rows": rows}


def _at_scales(columns: Float[Tensor, "B columns"], factors: Sequence[float]) -> list[AtScale]:
    """The changes at each factor times the step, from the columns of [`columns_along`]."""
    (start, points), prompts = points_of(columns, len(factors)), torch.arange(len(columns))
    found: list[AtScale] = []
    for factor, there in zip(factors, points, strict=True):
        changes = {n: c.estimate(prompts).as_dict() for n, c in changes_at(start, there, factor).items()}
        found.append({
            "scale": factor, "importance_ess": sample_size_at(start, there), "measured": changes["measured"],
            "linear": changes["linear"], "error_linear": changes["error_linear"],
        })  # fmt: skip
    return found


def _shares(parts: UpdateParts, gradient: Float[Tensor, " D"]) -> list[float]:
    """Shares of momentum, weight decay and gradient in the first-order change."""
    products = torch.stack([part.double() @ gradient.double() for part in parts])
    return [float(share) + 0.0 for share in products / products.sum()]


def table(result: Result) -> str:
    """The result as text, with changes in units of 1e-3 nats per token."""
    number = result["num_completions"]
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
    return "\n".join([*lines, f"\nchanges in 1e-3 nats/token, with 95 % intervals, on {number} completions"])


def draw(result: Result, left: Axes, right: Axes) -> None:
    """Left: true changes of steps of equal length. Right: both cosines."""
    from trl_entropy.analysis.plots import BLUE, GREY, ORANGE

    places = range(len(result["rows"]))
    for y, row in zip(places, result["rows"], strict=True):
        entry = row["equal_length"]["measured"]
        error = 1e3 * (entry["high"] - entry["value"])
        left.errorbar(1e3 * entry["value"], y, xerr=error, fmt="o", color=BLUE, capsize=3)
        for cosine, color in ((row["cosine_grad_h"], BLUE), (row["cosine_M_grad_h"], ORANGE)):
            right.plot(cosine if math.isfinite(cosine) else 0, y, "o", color=color)
    left.set(xlabel="entropy change at equal length, 1e-3 nats/token, 95 %")
    right.set(xlabel="cosine with grad h (blue), M grad h (orange)")
    for axes in (left, right):
        axes.axvline(0, color=GREY, lw=0.8)
        axes.set_yticks(places, [row["rule"] for row in result["rows"]])
        axes.invert_yaxis()


COMMAND = Command(
    "conditioning",
    "What does the optimizer's preconditioning do to the entropy? One gradient and one state, five update rules.",
    {"num_completions": (1024, 64, "completions on which the changes are measured")},
    compute,
    table,
    draw,
)
main = COMMAND.main
