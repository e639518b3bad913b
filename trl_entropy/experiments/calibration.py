"""
Are the stated error bars right? Coverage of the 95 % intervals over many redraws at one fixed state.

    trl-entropy experiment calibration --checkpoint RUN/checkpoint-N

One update is made at the checkpoint. Its entropy change is then estimated on many independent probe batches: measured
(T7), to first order (T8), by the trapezoid (T10), and their paired differences. The U-statistic (T17) is estimated on
many independent rollouts. What the intervals should cover is the same quantity on all redraws together.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, NotRequired, TypedDict

import torch
from jaxtyping import Float
from torch import Tensor

from trl_entropy.estimators.entropy_change.step_change import step_changes, unstacked
from trl_entropy.estimators.statistics.calibration import Coverage, coverage, kurtosis
from trl_entropy.estimators.statistics.estimate import Estimate, Linearization
from trl_entropy.estimators.statistics.student_t import student_t_quantile
from trl_entropy.estimators.statistics.u_statistic import (
    row_means,
    u_statistic_estimate,
    u_statistic_jackknife_estimate,
    u_statistic_variance,
)
from trl_entropy.experiments.command import VECTORS_OF_STATE, Command
from trl_entropy.experiments.output import Numbers
from trl_entropy.experiments.redraws import Cache, probe_pool, rollout_redraws
from trl_entropy.experiments.state import FixedState

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LABELS = {
    "measured": "measured (T7)",
    "linear": "first order (T8)",
    "trapezoid": "trapezoid (T10)",
    "error_linear": "first order - measured",
    "error_trapezoid": "trapezoid - measured",
    "measured_sequence": "measured, sequence weights",
    "linear_sequence": "first order, sequence form",
    "u_statistic": "U-statistic (T17)",
    "u_statistic_jackknife": "U-statistic, jackknife",
}

# The pool is also cut into fewer, larger probe batches, to see whether the coverage improves with their size.
_LARGER = (4, 16)
_FEWEST_REDRAWS = 100


class Result(TypedDict):
    """What `calibration.json` holds; `larger_batches` by the number of prompts in each."""

    state: Numbers
    quantities: dict[str, Numbers]
    larger_batches: dict[int, dict[str, Numbers]]
    u_statistic_variance_ratio: NotRequired[float]


@dataclass(frozen=True)
class Quantity:
    """
    One estimator over its redraws.

    Attributes:
        coverage: of its intervals.
        truth_stderr: standard error of the truth itself, nats per token.
        kurtosis: of the influences of single completions: 3 if they are normal, nan if the estimator has none.
    """

    coverage: Coverage
    truth_stderr: float
    kurtosis: float = math.nan

    def as_dict(self) -> Numbers:
        ratios = ("stderr_ratio", "rms_stderr_ratio", "bias_ratio")
        return {
            **asdict(self.coverage),
            **{name: getattr(self.coverage, name) for name in ratios},
            "truth_stderr": self.truth_stderr,
            "kurtosis": self.kurtosis,
        }


def probe_changes(columns: Float[Tensor, "B columns"]) -> dict[str, Linearization]:
    """Every change on one probe batch, nats per token, from the columns of [`probe_pool`]."""
    decision, sequence = (
        step_changes(unstacked(form[:, :4]), unstacked(form[:, 4:])) for form in columns.chunk(2, dim=1)
    )
    changes = {name: decision[name] for name in ("measured", "linear", "trapezoid")}
    changes |= {f"error_{name}": decision[name] - decision["measured"] for name in ("linear", "trapezoid")}
    return changes | {f"{name}_sequence": sequence[name] for name in ("measured", "linear")}


def calibrate_probe(pool: Float[Tensor, "B columns"], num_prompts: int) -> dict[str, Quantity]:
    """Coverage for each change over disjoint probe batches of `num_prompts`; the truth is that on the whole pool."""

    def estimates(changes: dict[str, Linearization]) -> dict[str, Estimate]:
        return {name: change.estimate(torch.arange(len(change.influence))) for name, change in changes.items()}

    of_pool = probe_changes(pool)
    truth = estimates(of_pool)
    rows = [estimates(probe_changes(columns)) for columns in pool.split(num_prompts) if len(columns) == num_prompts]
    return {
        name: Quantity(
            coverage([row[name] for row in rows], pooled.value), pooled.stderr, kurtosis(of_pool[name].influence)
        )
        for name, pooled in truth.items()
    }


def calibrate_u_statistic(grams: Float[Tensor, "R P P"]) -> dict[str, Quantity]:
    """Coverage for the U-statistic with its unbiased and its jackknife error; the truth is the mean over redraws."""
    redraws = {
        "u_statistic": [u_statistic_estimate(gram) for gram in grams],
        "u_statistic_jackknife": [u_statistic_jackknife_estimate(row_means(gram)) for gram in grams],
    }
    values = torch.tensor([estimate.value for estimate in redraws["u_statistic"]], dtype=torch.float64)
    stderr = float(values.std()) / math.sqrt(len(values))
    return {
        name: Quantity(coverage(estimates, float(values.mean())), stderr)
        for name, estimates in redraws.items()
        if sum(not math.isnan(estimate.stderr) for estimate in estimates) > 1
    }


def variance_ratio(grams: Float[Tensor, "R P P"]) -> float:
    """Mean of the unbiased variance estimates of U, negative ones included, over the variance of U: expected 1."""
    values = torch.stack([row_means(gram).mean() for gram in grams])
    return float(torch.tensor([u_statistic_variance(gram) for gram in grams]).mean() / values.var())


def compute(state: FixedState, cache: Cache, options: argparse.Namespace) -> Result:
    """Draw and score the redraws, and compare the stated errors with their scatter."""
    num_redraws, num_prompts = options.num_redraws, options.num_prompts
    pool = probe_pool(state, cache, num_redraws * num_prompts, options.seed, options.batch_size)
    quantities = calibrate_probe(pool, num_prompts)
    result: Result = {
        "state": describe_state(state, pool),
        "quantities": {},
        "larger_batches": {
            size: _as_dicts(calibrate_probe(pool, size))
            for size in (num_prompts * factor for factor in _LARGER)
            if len(pool) // size >= _FEWEST_REDRAWS
        },
    }
    if options.num_u_redraws:
        grams = rollout_redraws(
            state, cache, options.num_u_redraws, options.u_prompts, options.u_generations, options.seed
        )
        quantities |= calibrate_u_statistic(grams)
        result["u_statistic_variance_ratio"] = variance_ratio(grams)
    result["quantities"] = _as_dicts(quantities)
    return result


def _as_dicts(quantities: dict[str, Quantity]) -> dict[str, Numbers]:
    return {name: quantity.as_dict() for name, quantity in quantities.items()}


def describe_state(state: FixedState, pool: Float[Tensor, "B columns"]) -> dict[str, float]:
    """Numbers that describe the policy and the step that was made from it."""
    context = state.context
    update = torch.cat([value.flatten() for value in state.update.values()]).double()
    return {
        "optimizer_step": context.optimizer_step,
        "learning_rate": max(context.learning_rate.values()),
        "grad_norm": context.grad_norm,
        "clip_factor": context.clip_factor,
        "update_norm": float(update.norm()),
        "policy_entropy": float(pool[:, 0].sum() / pool[:, 1].sum()),
        "mean_length": float(pool[:, 1].mean()),
    }


def table(result: Result) -> str:
    """The result as text, with values in units of 1e-3 nats per token."""
    lines = [
        f"{'x 1e-3 nats/token':<28}{'truth':>9}{'error':>9}{'scatter':>9}{'stated':>9}{'ratio':>7}{'bias/sc':>9}"
        f"{'coverage (95 %)':>24}{'above':>7}{'below':>7}{'n':>6}{'kurt':>7}"
    ]
    for name, row in result["quantities"].items():
        numbers = "".join(f"{1e3 * row[key]:9.4f}" for key in ("truth", "truth_stderr", "scatter", "mean_stderr"))
        lines.append(
            f"{LABELS[name]:<28}{numbers}{row['stderr_ratio']:7.3f}{row['bias_ratio']:9.3f}{_covered(row):>24}"
            f"{row['missed_above']:7.3f}{row['missed_below']:7.3f}{row['num_redraws']:6d}{row['kurtosis']:7.0f}"
        )
    return "\n".join([*lines, "", *_notes(result), *_larger_batches(result)])


def _covered(row: Numbers) -> str:
    return f"{row['covered']:.3f} [{row['covered_low']:.3f}, {row['covered_high']:.3f}]"


def _larger_batches(result: Result) -> list[str]:
    lines = []
    for size, rows in result["larger_batches"].items():
        lines += ["", f"the same completions in batches of {size} prompts: coverage, stated error / scatter, redraws"]
        for name, row in rows.items():
            lines.append(f"{LABELS[name]:<28}{_covered(row):>24}{row['stderr_ratio']:7.3f}{row['num_redraws']:7d}")
    return lines


def _notes(result: Result) -> list[str]:
    notes = [
        "truth, error: the quantity on all redraws together, and its own standard error. scatter: standard deviation",
        "over redraws. stated: mean stated error. ratio: stated / scatter. bias/sc: bias / scatter. above, below:",
        "share of intervals that lie wholly above or below the truth. n: number of redraws. kurt: kurtosis of the",
        "influences of single completions (normal: 3); an interval needs several times as many completions.",
        "The standard error of the truth is 1/sqrt(n) of a redraw's; it moves the expected coverage by about 0.11/n.",
    ]
    u_statistic = result["quantities"].get("u_statistic")
    if u_statistic:
        total = u_statistic["num_redraws"] + u_statistic["num_without_stderr"]
        notes += [
            f"U-statistic: in {u_statistic['num_without_stderr']} of {total} redraws the unbiased variance estimate "
            "is negative, so that there is no interval; these are left out of its row.",
            f"Mean of all {total} variance estimates / variance of the values: "
            f"{result['u_statistic_variance_ratio']:.3f}. The jackknife is conservative by construction.",
        ]
    elif "u_statistic_variance_ratio" in result:
        notes.append("U-statistic: fewer than 2 redraws had a positive variance estimate, so it has no row.")
    return notes


def draw(result: Result, left: Axes, right: Axes) -> None:
    """Left: coverage with its binomial interval. Right: stated error over scatter. One row for each quantity."""
    rows = result["quantities"]
    right.sharey(left)
    plot_coverage(left, rows)
    plot_stderr_ratio(right, rows)
    right.tick_params(labelleft=False)


def plot_coverage(axes: Axes, rows: dict[str, Numbers]) -> Axes:
    """Share of 95 % intervals that cover the truth; the grey band is 93 to 97 %."""
    from trl_entropy.analysis.plots import GREY

    axes.axvspan(0.93, 0.97, color=GREY, alpha=0.2, lw=0)
    axes.axvline(0.95, color=GREY, lw=1)
    for y, (name, row) in enumerate(rows.items()):
        error = [[row["covered"] - row["covered_low"]], [row["covered_high"] - row["covered"]]]
        color, marker = _style(name)
        axes.errorbar(row["covered"], y, xerr=error, fmt=marker, ms=5, color=color, capsize=3)
    axes.set(title="Coverage of stated 95 % intervals", xlabel="share of redraws (Wilson 95 % interval)")
    axes.set_yticks(range(len(rows)), [LABELS[name] for name in rows])
    axes.invert_yaxis()
    return _bare(axes)


def plot_stderr_ratio(axes: Axes, rows: dict[str, Numbers]) -> Axes:
    """Mean stated error over scatter, with 95 % intervals by the error of the scatter. Below 1: stated too small."""
    from trl_entropy.analysis.plots import GREY

    axes.axvline(1.0, color=GREY, lw=1)
    for y, (name, row) in enumerate(rows.items()):
        color, marker = _style(name)
        quantile = student_t_quantile(0.975, row["num_redraws"] - 1.0)
        error = quantile * row["stderr_ratio"] * row["scatter_stderr"] / row["scatter"]
        axes.errorbar(row["stderr_ratio"], y, xerr=error, fmt=marker, ms=5, color=color, capsize=3)
    axes.set(title="Stated error against scatter", xlabel="mean stated error / scatter over redraws")
    return _bare(axes)


def _style(name: str) -> tuple[str, str]:
    from trl_entropy.analysis.plots import BLUE, GREEN, ORANGE

    if name.startswith("u_statistic"):
        return ORANGE, "s"
    return (GREEN, "^") if name.endswith("_sequence") else (BLUE, "o")


def _bare(axes: Axes) -> Axes:
    axes.grid(axis="x", alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    return axes


COMMAND = Command(
    "calibration",
    "Are the stated error bars right? Coverage of the 95 % intervals over many redraws at one fixed state.",
    {
        "num_redraws": (2000, 2, "independent probe batches"),
        "num_prompts": (32, 2, "prompts in each, with one completion of each prompt"),
        "num_u_redraws": (500, 0, "independent rollouts for the U-statistic (T17); 0: none"),
        "u_prompts": (8, 4, "prompts in each of these rollouts"),
        "u_generations": (4, 2, "completions of each prompt in these rollouts"),
    },
    compute,
    table,
    draw,
    vectors=lambda checkpoint, options: VECTORS_OF_STATE + 4 * options.u_prompts,
)
main = COMMAND.main
