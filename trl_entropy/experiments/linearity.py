"""
How far does first order hold? The step that AdamW would make, shorter and longer, at one fixed state.

    trl-entropy experiment linearity --checkpoint RUN/checkpoint-N

One pool of completions tells the true change (T6), (T7) at every length of the step, and first and second order (T8),
(T10) from one forward-mode pass. All are paired, so that their differences are known better than they are.
"""

from __future__ import annotations

import argparse
import math
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from trl_entropy.estimators.entropy_change.delta_entropy import critical_length, delta_measured
from trl_entropy.estimators.statistics.estimate import Estimate
from trl_entropy.experiments.along import changes_at, columns_along, points_of, sample_size_at
from trl_entropy.experiments.command import Command, with_interval
from trl_entropy.experiments.redraws import ROWS_PER_CHUNK, Cache, in_chunks, pool_completions
from trl_entropy.experiments.state import FixedState

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Lengths of the step, in units of the step that AdamW would make: 2^-4 to 2^4.
FACTORS = tuple(2.0**power for power in range(-4, 5))
_CURVES = ("measured", "linear", "second_order")


def sweep_pool(
    state: FixedState, cache: Cache, num_completions: int, seed: int, batch_size: int
) -> Float[Tensor, "B columns"]:
    """Per-completion terms of the pool along the step: those of [`columns_along`], to second order."""
    size = min(ROWS_PER_CHUNK, num_completions)

    def chunk(index: int) -> Tensor:
        completions = pool_completions(state, size, seed, index)
        return columns_along(state, completions, state.update, FACTORS, 2, batch_size)

    return in_chunks(cache, f"sweep-{len(FACTORS)}", num_completions, size, chunk)


def log_log_slope(columns: Float[Tensor, "B columns"], longest: float) -> float:
    """Slope of log |true change| on log length over factors up to `longest`; 1 where first order holds."""
    start, points = points_of(columns, len(FACTORS))
    factors = [factor for factor in FACTORS if factor <= longest]
    points = points[: len(factors)]
    changes = torch.stack([delta_measured(start.terms, there).value for there in points]).abs().log()
    lengths = torch.tensor(factors, dtype=torch.float64).log()
    lengths = lengths - lengths.mean()
    return float((lengths * changes).sum() / lengths.square().sum())


def slope_estimate(columns: Float[Tensor, "B columns"], longest: float, num_blocks: int = 32) -> Estimate:
    """The slope with the error of a delete-one-block jackknife over completions."""
    blocks = torch.arange(len(columns)) % num_blocks
    left_out = torch.tensor([log_log_slope(columns[blocks != block], longest) for block in range(num_blocks)])
    variance = (num_blocks - 1) * left_out.double().var(correction=0)
    return Estimate(log_log_slope(columns, longest), math.sqrt(variance), num_blocks - 1, len(columns))


def compute(state: FixedState, cache: Cache, options: argparse.Namespace) -> dict[str, Any]:
    """Everything but the output."""
    columns = sweep_pool(state, cache, options.num_completions, options.seed, options.batch_size)
    start, points = points_of(columns, len(FACTORS))
    assert start.second_tangents is not None
    eta_star = critical_length(start.terms, start.tangents, start.second_tangents)
    prompts = torch.arange(len(columns))
    rows = []
    for factor, there in zip(FACTORS, points, strict=True):
        changes = changes_at(start, there, factor)
        row = {name: change.estimate(prompts).as_dict() for name, change in changes.items()}
        rows.append({"factor": factor, "importance_ess": sample_size_at(start, there), **row})
    return {
        "learning_rate": max(state.context.learning_rate.values()),
        "num_completions": len(columns),
        "rows": rows,
        "log_log_slope": slope_estimate(columns, longest=1.0).as_dict(),
        "log_log_slope_all": slope_estimate(columns, longest=FACTORS[-1]).as_dict(),
        "end_of_linearity": eta_star.estimate(prompts).as_dict(),
    }


def table(result: dict[str, Any]) -> str:
    """The result as text; changes in units of 1e-3 nats per token."""
    lines = [
        "| steps | learning rate | true | first order | second order | first - true | second - true | ESS |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        names = (*_CURVES, "error_linear", "error_second_order")
        cells = " | ".join(with_interval(row[name], 1e3) for name in names)
        rate = row["factor"] * result["learning_rate"]
        lines.append(f"| {row['factor']:g} | {rate:.3g} | {cells} | {row['importance_ess']:.0f} |")
    slope, whole, end = (result[name] for name in ("log_log_slope", "log_log_slope_all", "end_of_linearity"))
    return "\n".join([
        *lines,
        f"\nx 1e-3 nats/token, 95 % intervals, {result['num_completions']} completions",
        f"log-log slope of the true change up to 1 step: {with_interval(slope)}; over all: {with_interval(whole)}",
        f"eta*, where second order is as large as first: {with_interval(end)} steps",
    ])  # fmt: skip


def draw(result: dict[str, Any], left: Axes, right: Axes) -> None:
    """Change against length, and first order over the true change."""
    from trl_entropy.analysis.plots import BLUE, GREEN, GREY, ORANGE

    rows = result["rows"]
    lengths = [row["factor"] for row in rows]
    for name, color, style in zip(_CURVES, (BLUE, ORANGE, GREEN), ("o", "-", "--"), strict=True):
        values = [abs(row[name]["value"]) for row in rows]
        left.plot(lengths, values, style, color=color, label=name.replace("_", " "))
    left.set(xscale="log", yscale="log", xlabel="length, steps of AdamW", ylabel="|entropy change|, nats/token")
    left.legend(frameon=False)
    for name, color in (("linear", ORANGE), ("second_order", GREEN)):
        ratios = [row[name]["value"] / row["measured"]["value"] for row in rows]
        errors = [1.96 * row[f"error_{name}"]["stderr"] / abs(row["measured"]["value"]) for row in rows]
        right.errorbar(lengths, ratios, errors, color=color, fmt="o-", ms=4, label=name.replace("_", " "))
    right.axhline(1, color=GREY, lw=0.8)
    right.axvline(result["end_of_linearity"]["value"], color=GREY, ls=":", label="eta*")
    right.set(xscale="log", xlabel="length, steps of AdamW", ylabel="predicted / true", ylim=(0, 2))
    right.legend(frameon=False)


COMMAND = Command(
    "linearity",
    "How far does first order hold? The step that AdamW would make, shorter and longer, at one fixed state.",
    {"num_completions": (2048, 64, "completions that the changes are measured on")},
    compute,
    table,
    draw,
)
main = COMMAND.main
