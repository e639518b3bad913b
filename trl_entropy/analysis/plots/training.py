"""Figures of training: reward, entropy and its change at each step, and several runs together."""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from trl_entropy.analysis.comparison import over_runs
from trl_entropy.analysis.plots.axes import (
    BLUE,
    GREY,
    ORANGE,
    SERIES,
    Rows,
    finished,
    half_widths,
    is_finite,
    nothing,
    plot_key,
    thinned,
    with_unit,
)
from trl_entropy.runs.metrics import PASS_AT_1, unit


def plot_reward(axes: Axes, metrics: Rows) -> Axes:
    """Mean reward of each step's own completions."""
    axes.set(title="Reward", ylabel="mean reward")
    if not any(is_finite(row.get("reward")) for row in metrics):
        return nothing(axes, "No step of the run has a reward.")
    return plot_key(axes, metrics, "reward", "training batch", BLUE, lw=1.2)


def _plot_held_out(axes: Axes, evaluation: Rows, key: str) -> None:
    """`key` of each evaluation set, as a line; several have their names in the legend."""
    for name in dict.fromkeys(str(row.get("dataset", "")) for row in evaluation) or [""]:
        rows = [row for row in evaluation if str(row.get("dataset", "")) == name]
        color = None if name else ORANGE
        plot_key(axes, rows, key, f"held out, {name}" if name else "held out", color, marker="o", lw=1.5)
        if name:
            axes.legend(frameon=False, fontsize="small")


def plot_pass_at_1(axes: Axes, evaluation: Rows) -> Axes:
    """pass@1 on held-out problems: the fraction of sampled completions that are correct."""
    axes.set(title="Held-out pass@1", ylabel="fraction of completions correct", ylim=(0, 1))
    if not any(row.get(PASS_AT_1) is not None for row in evaluation):
        return nothing(axes, f"Training did not evaluate {PASS_AT_1} on held-out prompts.")
    _plot_held_out(axes, evaluation, PASS_AT_1)
    return axes


def plot_entropy(axes: Axes, metrics: Rows, evaluation: Rows) -> Axes:
    """The policy's entropy on the training batches and on held-out prompts."""
    axes.set(title="Policy entropy", ylabel=unit("entropy/policy"))
    if not any(is_finite(row.get("entropy/policy", row.get("entropy"))) for row in [*metrics, *evaluation]):
        return nothing(axes, "No step of the run has an entropy.")
    plot_key(axes, metrics, "entropy/policy", "training batch", BLUE, lw=1.2)
    _plot_held_out(axes, evaluation, "entropy")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    return axes


def plot_entropy_change(axes: Axes, metrics: Rows) -> Axes:
    """The entropy change of each probed step: measured, with 95 % intervals, and predicted to first order."""
    axes.set(title="Entropy change of a step", ylabel=unit("entropy/delta_measured"))
    probed = [row for row in metrics if row.get("entropy/delta_measured") is not None]
    if not probed:
        return nothing(axes, "No step measured its entropy change. Train with entropy_probe: true.")
    shown, part = thinned(probed)
    steps = [row["step"] for row in shown]
    errors, name = half_widths(shown, "entropy/delta_measured", "entropy/num_prompts")
    axes.axhline(0, color=GREY, lw=0.8)
    measured = [row["entropy/delta_measured"] for row in shown]
    axes.errorbar(
        steps, measured, errors, color=BLUE, fmt="o", ms=4, lw=1.2, capsize=2, label=f"measured, {name}{part}"
    )
    plot_key(axes, shown, "entropy/delta_linear", "predicted, first order", ORANGE, marker="x", ls="")
    axes.legend(frameon=False)
    return axes


def plot_prediction(axes: Axes, rows: Rows, predictor: str) -> Axes:
    """
    Measured change on one half of the prompts against predicted change on the other, a point for each step, with 95 %
    intervals.

    Args:
        rows: `Run.rows("entropy/half_b_measured")`; rows without the change of a half are left out.
        predictor: `linear`, `second_order` or `trapezoid`; `linear` is drawn where the run does not have it.
    """
    if not any(row.get(f"entropy/half_a_{predictor}") is not None for row in rows):
        predictor = "linear"
    x, y = f"entropy/half_a_{predictor}", "entropy/half_b_measured"
    rows = [row for row in rows if row.get(x) is not None and row.get(y) is not None]
    if not rows:
        return nothing(
            axes, "No step compared halves of a probe batch. Train with entropy_probe: true, not on rollouts."
        )
    shown, part = thinned(rows)
    ends = [min(row[x] for row in shown), max(row[x] for row in shown)]
    axes.plot(ends, ends, color=GREY, lw=0.8, label="prediction = measurement")
    (y_errors, name), (x_errors, _) = (
        half_widths(shown, key, f"entropy/half_{half}_num_prompts") for key, half in ((y, "b"), (x, "a"))
    )
    axes.errorbar(
        [row[x] for row in shown], [row[y] for row in shown], y_errors, x_errors,
        color=BLUE, fmt="o", ms=3, lw=0.7, label=f"one step, {name}{part}",
    )  # fmt: skip
    name = predictor.replace("_", " ")
    axes.set(xlabel=f"predicted ({name}), nats/token", ylabel="measured on other prompts, nats/token")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    return axes


def plot_integral(axes: Axes, integral: Mapping[str, Any]) -> Axes:
    """
    The entropy of freshly drawn completions at each step (95 %), and that at the start plus the predicted changes.

    Args:
        integral: `steps`, `fresh`, `fresh_stderr`, `fresh_num_prompts`, and by name of a prediction its `values`.
    """
    rows = [
        {"fresh_stderr": error, "num_prompts": number}
        for error, number in zip(integral["fresh_stderr"], integral["fresh_num_prompts"], strict=True)
    ]
    errors, name = half_widths(rows, "fresh", "num_prompts")
    axes.errorbar(
        integral["steps"], integral["fresh"], errors,
        color=GREY, fmt=".", ms=4, lw=0.7, label=f"fresh completions, {name}",
    )  # fmt: skip
    for name, color in (("linear", ORANGE), ("second_order", BLUE)):
        if name in integral:
            label = f"sum of predictions ({name.replace('_', ' ')})"
            axes.plot(integral["steps"], integral[name]["values"], color=color, lw=1.4, label=label)
    axes.set(xlabel="optimizer step", ylabel=unit("entropy/probe_batch"))
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    return axes


def plot_runs(axes: Axes, steps: pd.DataFrame, key: str) -> Axes:
    """
    One key of several runs, a thin line each, with the mean over runs and its 95 % interval (Student's t).

    Runs whose settings differ have no mean in common: their settings stand in the legend. The axes fit the runs; an
    interval of few runs may reach beyond them.

    Args:
        steps: from `analysis.comparison.compare_runs`.
        key: a column of it.
    """
    given = steps[np.isfinite(steps[key].astype(float))] if key in steps else steps[:0]
    if given.empty:
        return nothing(axes, f"No step of these runs has {key}.")
    given = given if "settings" in given else given.assign(settings="")
    for ((run, settings), rows), (color, marker) in zip(given.groupby(["run", "settings"]), itertools.cycle(SERIES)):
        label = textwrap.fill(", ".join(filter(None, [str(run), str(settings)])), 44)
        axes.plot(rows["step"], rows[key], color=color, marker=marker, ms=2, lw=0.7, alpha=0.7, label=label)
    limits = axes.get_xlim(), axes.get_ylim()
    if given["settings"].nunique() == 1 and given["run"].nunique() > 1:
        mean = over_runs(given, key)
        axes.plot(mean.index, mean["mean"], color="black", lw=1.6, label="mean, 95 % over runs")
        axes.fill_between(mean.index, mean["low"], mean["high"], color="black", alpha=0.12, lw=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlabel="optimizer step", ylabel=with_unit(key), xlim=limits[0], ylim=limits[1])
    return finished(axes)
