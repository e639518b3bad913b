"""
How far does the first-order prediction hold? AdamW's next step, made shorter and longer, at one fixed state.

    trl-entropy experiment linearity --checkpoint RUN/checkpoint-N

The true change (T6), (T7) at every length of the step is measured on one pool of completions; the predictions of
first and second order (T8), (T10) come from one forward-mode pass over the same pool. All of them are paired, so that
their differences have smaller errors than they have themselves.
"""

from __future__ import annotations

import argparse
import math
from typing import TYPE_CHECKING, Literal, TypedDict

import torch
from jaxtyping import Float
from torch import Tensor

from trl_entropy.estimators.entropy_change.delta_entropy import critical_length, delta_measured
from trl_entropy.estimators.statistics.estimate import Estimate
from trl_entropy.experiments.along import changes_at, columns_along, points_of, sample_size_at
from trl_entropy.experiments.command import Command
from trl_entropy.experiments.output import Numbers, with_interval
from trl_entropy.experiments.redraws import ROWS_PER_CHUNK, Cache, in_chunks, pool_completions
from trl_entropy.experiments.state import FixedState

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Lengths of the step in units of the step that AdamW would make: 2^-4 to 2^4.
FACTORS = tuple(2.0**power for power in range(-4, 5))
Curve = Literal["measured", "linear", "second_order"]
Prediction = Literal["linear", "second_order"]
_CURVES: tuple[Curve, ...] = ("measured", "linear", "second_order")
_ERRORS: dict[Prediction, Literal["error_linear", "error_second_order"]] = {
    "linear": "error_linear",
    "second_order": "error_second_order",
}


class Row(TypedDict):
    """Changes at one length of the step, with errors; `error_` are predictions less the true change."""

    factor: float
    importance_ess: float
    measured: Numbers
    linear: Numbers
    second_order: Numbers
    error_linear: Numbers
    error_second_order: Numbers


class Result(TypedDict):
    """What `linearity.json` holds; changes in nats per token."""

    learning_rate: float
    num_completions: int
    rows: list[Row]
    log_log_slope: Numbers
    log_log_slope_all: Numbers
    end_of_linearity: Numbers


def sweep_pool(
    state: FixedState, cache: Cache, num_completions: int, seed: int, batch_size: int
) -> Float[Tensor, "B columns"]:
    """Per-completion terms of the pool along the step, as of [`columns_along`], with two derivatives."""
    size = min(ROWS_PER_CHUNK, num_completions)

    def chunk(index: int) -> Tensor:
        completions = pool_completions(state, size, seed, index)
        return columns_along(state, completions, state.update, FACTORS, 2, batch_size)

    return in_chunks(cache, f"sweep-{len(FACTORS)}", num_completions, size, chunk)


def log_log_slope(columns: Float[Tensor, "B columns"], longest: float) -> float:
    """Slope of log |true change| on log length, over factors up to `longest`; 1 where first order holds."""
    start, points = points_of(columns, len(FACTORS))
    factors = [factor for factor in FACTORS if factor <= longest]
    points = points[: len(factors)]
    changes = torch.stack([delta_measured(start.terms, there).value for there in points]).abs().log()
    lengths = torch.tensor(factors, dtype=torch.float64).log()
    lengths = lengths - lengths.mean()
    return float((lengths * changes).sum() / lengths.square().sum())


def slope_estimate(columns: Float[Tensor, "B columns"], longest: float, num_blocks: int = 32) -> Estimate:
    """[`log_log_slope`] with its standard error, by a jackknife that leaves out one block of completions at a time."""
    blocks = torch.arange(len(columns)) % num_blocks
    left_out = torch.tensor([log_log_slope(columns[blocks != block], longest) for block in range(num_blocks)])
    variance = (num_blocks - 1) * left_out.double().var(correction=0)
    return Estimate(log_log_slope(columns, longest), math.sqrt(variance), num_blocks - 1, len(columns))


def compute(state: FixedState, cache: Cache, options: argparse.Namespace) -> Result:
    """The true change and the predictions at every length of the step."""
    columns = sweep_pool(state, cache, options.num_completions, options.seed, options.batch_size)
    start, points = points_of(columns, len(FACTORS))
    assert start.tangents is not None and start.second_tangents is not None
    eta_star = critical_length(start.terms, start.tangents, start.second_tangents)
    prompts = torch.arange(len(columns))
    rows: list[Row] = []
    for factor, there in zip(FACTORS, points, strict=True):
        changes = changes_at(start, there, factor)
        found = {name: change.estimate(prompts).as_dict() for name, change in changes.items()}
        rows.append({
            "factor": factor, "importance_ess": sample_size_at(start, there), "measured": found["measured"],
            "linear": found["linear"], "second_order": found["second_order"],
            "error_linear": found["error_linear"], "error_second_order": found["error_second_order"],
        })  # fmt: skip
    return {
        "learning_rate": max(state.context.learning_rate.values()),
        "num_completions": len(columns),
        "rows": rows,
        "log_log_slope": slope_estimate(columns, longest=1.0).as_dict(),
        "log_log_slope_all": slope_estimate(columns, longest=FACTORS[-1]).as_dict(),
        "end_of_linearity": eta_star.estimate(prompts).as_dict(),
    }


def table(result: Result) -> str:
    """The result as text, with changes in units of 1e-3 nats per token."""
    lines = [
        "| steps | learning rate | true | first order | second order | first - true | second - true | ESS |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        cells = " | ".join(with_interval(row[name], 1e3) for name in (*_CURVES, *_ERRORS.values()))
        rate = row["factor"] * result["learning_rate"]
        lines.append(f"| {row['factor']:g} | {rate:.3g} | {cells} | {row['importance_ess']:.0f} |")
    slope, whole, end = result["log_log_slope"], result["log_log_slope_all"], result["end_of_linearity"]
    return "\n".join([
        *lines,
        f"\nchanges in 1e-3 nats/token, with 95 % intervals, on {result['num_completions']} completions",
        f"log-log slope of the true change up to 1 step: {with_interval(slope)}; all lengths: {with_interval(whole)}",
        f"eta*, the length at which second order is as large as first: {with_interval(end)} steps",
    ])  # fmt: skip


def draw(result: Result, left: Axes, right: Axes) -> None:
    """Left: change against length of the step. Right: predictions over the true change."""
    from trl_entropy.analysis.plots import BLUE, GREEN, GREY, ORANGE

    rows = result["rows"]
    lengths = [row["factor"] for row in rows]
    for curve, color, style in zip(_CURVES, (BLUE, ORANGE, GREEN), ("o", "-", "--"), strict=True):
        values = [abs(row[curve]["value"]) for row in rows]
        left.plot(lengths, values, style, color=color, label=curve.replace("_", " "))
    left.set(xscale="log", yscale="log", xlabel="length, steps of AdamW", ylabel="|entropy change|, nats/token")
    left.legend(frameon=False)
    for (name, error), color in zip(_ERRORS.items(), (ORANGE, GREEN), strict=True):
        ratios = [row[name]["value"] / row["measured"]["value"] for row in rows]
        errors = [(row[error]["high"] - row[error]["value"]) / abs(row["measured"]["value"]) for row in rows]
        right.errorbar(lengths, ratios, errors, color=color, fmt="o-", ms=4, label=name.replace("_", " "))
    right.axhline(1, color=GREY, lw=0.8)
    right.axvline(result["end_of_linearity"]["value"], color=GREY, ls=":", label="eta*")
    right.set(xscale="log", xlabel="length, steps of AdamW", ylabel="predicted / true", ylim=(0, 2))
    right.legend(frameon=False)


COMMAND = Command(
    "linearity",
    "How far does the first-order prediction hold? AdamW's next step, made shorter and longer, at one fixed state.",
    {"num_completions": (2048, 64, "completions on which the changes are measured")},
    compute,
    table,
    draw,
)
main = COMMAND.main
