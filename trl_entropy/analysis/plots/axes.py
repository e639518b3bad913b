"""What the figures have in common: colours, series of a run's rows, intervals, and a sentence in place of no data."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from trl_entropy.analysis.comparison import student_t
from trl_entropy.runs.metrics import unit
from trl_entropy.runs.strict_json import Row

# Okabe and Ito's palette.
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#7F7F7F"
SERIES = ((BLUE, "o"), (ORANGE, "s"), (GREEN, "^"), ("#CC79A7", "D"), ("#E69F00", "v"), ("#56B4E9", "P"))

Rows = Sequence[Row]


def series(rows: Rows, key: str) -> tuple[list[int], list[float]]:
    """The steps and values of `key` in the rows that have it."""
    pairs = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
    return [step for step, _ in pairs], [value for _, value in pairs]


def plot_key(axes: Axes, rows: Rows, key: str, label: str, color: str | None, **style: Any) -> Axes:
    """`key` over steps as a line; `style` goes to `Axes.plot`."""
    steps, values = series(rows, key)
    axes.plot(steps, values, color=color, label=label, **style)
    axes.set_xlabel("optimizer step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    return axes


def thinned(rows: Rows, most: int = 400) -> tuple[Rows, str]:
    """
    As many rows as points with intervals can be told apart in a figure: every n-th, the last among them.

    Returns:
        The rows, and what a legend adds: nothing, or ", 1 of n steps".
    """
    every = max(1, -(-len(rows) // most))
    return rows[::-every][::-1], "" if every == 1 else f", 1 of {every} steps"


def half_widths(rows: Rows, key: str, num_prompts: str) -> tuple[list[float], str]:
    """
    The half widths of the 95 % intervals of `key`, by Student's t, and what a legend calls them.

    Args:
        rows: rows that have `key`.
        key: an estimate whose standard error is clustered by prompt, with one degree of freedom less than prompts.
        num_prompts: the key of the number of prompts. Where a row lacks it, standard errors are returned and named.
    """
    found = [row.get(f"{key}_stderr") for row in rows]
    errors = [error if error is not None and math.isfinite(error) else math.nan for error in found]
    counts = [row.get(num_prompts) for row in rows]
    if not all(is_finite(count) for count in counts):
        return errors, "standard error"
    quantiles = [student_t(int(count or 0) - 1) for count in counts]
    return [quantile * error for quantile, error in zip(quantiles, errors, strict=True)], "95 %"


def nothing(axes: Axes, sentence: str) -> Axes:
    """Axes that say in a sentence why they show nothing."""
    axes.text(0.5, 0.5, textwrap.fill(sentence, 36), ha="center", va="center", transform=axes.transAxes, color=GREY)
    axes.set_axis_off()
    return axes


def labels(tokens: Iterable[str]) -> list[str]:
    """Texts of tokens for an axis, on which a dollar sign begins no formula."""
    return [repr(token)[1:-1].replace("$", r"\$") for token in tokens]


def is_finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def with_unit(key: str) -> str:
    return f"{key}, {unit(key)}" if unit(key) not in ("", "1", key) else key


def finished(axes: Axes) -> Axes:
    """With a grid, two of four spines, and a legend if anything has a name."""
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize="small")
    return axes
