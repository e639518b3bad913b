"""Figures from the rows of a run directory. Every function takes and returns axes; colours are colour-blind safe."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes

from trl_entropy.metrics import PASS_AT_1, unit

# Okabe and Ito's palette.
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#7F7F7F"

Rows = Sequence[dict[str, Any]]


def series(rows: Rows, key: str) -> tuple[list[int], list[float]]:
    """Steps and values of `key`, over the rows that have it."""
    pairs = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
    return [step for step, _ in pairs], [value for _, value in pairs]


def plot_key(axes: Axes, rows: Rows, key: str, label: str, color: str, **style: Any) -> Axes:
    """Draw `key` over steps."""
    steps, values = series(rows, key)
    axes.plot(steps, values, color=color, label=label, **style)
    axes.set_xlabel("optimizer step")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    return axes


def plot_reward(axes: Axes, metrics: Rows) -> Axes:
    """Mean reward of each step's own completions."""
    plot_key(axes, metrics, "reward", "training batch", BLUE, lw=1.2)
    axes.set(title="Reward", ylabel="mean reward")
    return axes


def plot_pass_at_1(axes: Axes, evaluation: Rows) -> Axes:
    """pass@1 on held-out problems: the share of sampled completions that are right."""
    plot_key(axes, evaluation, PASS_AT_1, "held out", ORANGE, marker="o", lw=1.5)
    axes.set(title="Held-out pass@1", ylabel="share of completions right", ylim=(0, 1))
    return axes


def plot_entropy_change(axes: Axes, metrics: Rows) -> Axes:
    """Entropy change of each probed step: measured, with 95 % intervals, and predicted to first order."""
    probed = [row for row in metrics if row.get("entropy/delta_measured") is not None]
    steps = [row["step"] for row in probed]
    errors = [1.96 * row["entropy/delta_measured_stderr"] for row in probed]
    axes.axhline(0, color=GREY, lw=0.8)
    measured = [row["entropy/delta_measured"] for row in probed]
    axes.errorbar(steps, measured, errors, color=BLUE, fmt="o", ms=4, lw=1.2, capsize=2, label="measured, 95 %")
    plot_key(axes, probed, "entropy/delta_linear", "predicted, first order", ORANGE, marker="x", ls="")
    axes.set(title="Entropy change of a step", ylabel=unit("entropy/delta_measured"))
    axes.legend(frameon=False)
    return axes


def plot_prediction(axes: Axes, rows: Rows, predictor: str) -> Axes:
    """Measured on one half of each probe batch against predicted on the other, one point a step, 95 % intervals."""
    predictor = predictor if f"entropy/half_a_{predictor}" in rows[0] else "linear"
    x, y = f"entropy/half_a_{predictor}", "entropy/half_b_measured"
    ends = [min(row[x] for row in rows), max(row[x] for row in rows)]
    axes.plot(ends, ends, color=GREY, lw=0.8, label="equal")
    axes.errorbar(
        [row[x] for row in rows],
        [row[y] for row in rows],
        [1.96 * row[f"{y}_stderr"] for row in rows],
        [1.96 * row[f"{x}_stderr"] for row in rows],
        color=BLUE,
        fmt="o",
        ms=3,
        lw=0.7,
        label="a step, 95 %",
    )
    name = predictor.replace("_", " ")
    axes.set(xlabel=f"predicted ({name}), nats/token", ylabel="measured on other prompts, nats/token")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    return axes


def plot_integral(axes: Axes, integral: dict[str, Any]) -> Axes:
    """Entropy of each step's fresh completions (95 %), and the start plus the sum of predicted changes."""
    errors = [1.96 * error for error in integral["fresh_stderr"]]
    axes.errorbar(
        integral["steps"],
        integral["fresh"],
        errors,
        color=GREY,
        fmt=".",
        ms=4,
        lw=0.7,
        label="fresh completions, 95 %",
    )
    for name, color in (("linear", ORANGE), ("second_order", BLUE)):
        if name in integral:
            label = f"sum of predictions ({name.replace('_', ' ')})"
            axes.plot(integral["steps"], integral[name]["values"], color=color, lw=1.4, label=label)
    axes.set(xlabel="optimizer step", ylabel=unit("entropy/probe"))
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    return axes


def plot_entropy(axes: Axes, metrics: Rows, evaluation: Rows) -> Axes:
    """Policy entropy of the training batches and of held-out completions."""
    plot_key(axes, metrics, "entropy/policy", "training batch", BLUE, lw=1.2)
    plot_key(axes, evaluation, "entropy", "held out", ORANGE, marker="o", lw=1.5)
    axes.set(title="Policy entropy", ylabel=unit("entropy/policy"))
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    return axes
