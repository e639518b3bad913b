"""Figures of the other probes: gradient noise, entropy control, Fisher kernel."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import pandas as pd
from matplotlib.axes import Axes

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
    series,
    thinned,
)
from trl_entropy.analysis.run import cosines_of, spectrum_of
from trl_entropy.runs.metrics import unit


def plot_noise_scale(axes: Axes, rows: Rows, metric: str = "simple") -> Axes:
    """
    The gradient noise scale with its 95 % interval, and the number of prompts in a step.

    Where |G|^2 is consistent with 0 the interval has no upper end; a triangle then marks its lower end.

    Args:
        rows: `Run.rows("noise_scale/simple")`.
        metric: `simple`, or `adam` for the noise scale in AdamW's metric.
    """
    key = f"noise_scale/{metric}"
    rows = [row for row in rows if row.get(key) is not None]
    if not rows:
        return nothing(axes, f"No step estimated the noise scale ({metric}). Train with noise_scale_probe: true.")
    rows, _ = thinned(rows)
    plot_key(axes, rows, key, f"noise scale ({metric})", BLUE, lw=1.4)
    bounded = [row for row in rows if is_finite(row.get(f"{key}_lower"))]
    if closed := [row for row in bounded if is_finite(row.get(f"{key}_upper"))]:
        low, high = ([row[f"{key}_{end}"] for row in closed] for end in ("lower", "upper"))
        axes.fill_between([row["step"] for row in closed], low, high, color=BLUE, alpha=0.2, lw=0, label="95 %")
    if without_end := [row for row in bounded if not is_finite(row.get(f"{key}_upper"))]:
        steps, low = ([row[name] for row in without_end] for name in ("step", f"{key}_lower"))
        axes.plot(steps, low, color=BLUE, ls="none", marker="^", ms=4, label="95 %, no upper end")
    plot_key(axes, rows, "noise_scale/num_prompts", "prompts in a step", ORANGE, ls="--")
    axes.set(ylabel="prompts")
    axes.set_yscale("symlog", linthresh=10)
    return finished(axes)


def plot_set_point(axes: Axes, rows: Rows, target: float | None = None) -> Axes:
    """
    The entropy before each step as `entropy_control` measures it, with 95 % intervals, and its target.

    Args:
        rows: `Run.rows("entropy_control/entropy")`.
        target: the setting `entropy_control_target`, in nats per token.
    """
    key = "entropy_control/entropy"
    rows = [row for row in rows if row.get(key) is not None]
    if not rows:
        return nothing(axes, "No step measured the entropy for a control. Train with entropy_control: hold.")
    rows, part = thinned(rows)
    steps, values = series(rows, key)
    errors, name = half_widths(rows, key, "entropy_control/num_prompts")
    label = f"before the step, {name}{part}"
    axes.errorbar(steps, values, errors, color=BLUE, fmt="o", ms=3, lw=0.8, capsize=2, label=label)
    if target is not None:
        axes.axhline(target, color=ORANGE, ls="--", label="target")
    axes.set(xlabel="optimizer step", ylabel=unit("entropy_control/entropy"))
    return finished(axes)


def plot_controlled_change(axes: Axes, rows: Rows) -> Axes:
    """
    The entropy change of each step under `entropy_control`: predicted without and with the correction, and measured.

    Args:
        rows: `Run.rows("entropy_control/entropy")`.
    """
    if not series(rows, "entropy_control/delta_predicted")[0]:
        return nothing(axes, "No step was predicted by a control. Train with entropy_control: hold.")
    plot_key(axes, rows, "entropy_control/delta_optimizer", "predicted, optimizer alone", GREY, lw=1.2)
    plot_key(axes, rows, "entropy_control/delta_predicted", "predicted, with correction", BLUE, lw=1.2)
    steps, values = series(rows, "entropy_control/realised_previous")
    axes.plot([step - 1 for step in steps], values, color=ORANGE, marker="o", ms=3, lw=0, label="measured")
    axes.axhline(0, color=GREY, lw=0.8)
    axes.set(ylabel=unit("entropy_control/delta_predicted"))
    return finished(axes)


def plot_kernel(axes: Axes, kernel: pd.DataFrame) -> Axes:
    """
    The cosines of a Fisher kernel, completion by completion; lines separate the prompts.

    Args:
        kernel: `Run.kernel(step)`.
    """
    if kernel.empty:
        return nothing(axes, "The run holds no Fisher kernel. Train with fisher_probe: true.")
    prompts = kernel.index.get_level_values("prompt_index").to_numpy()
    image = axes.imshow(cosines_of(kernel), cmap="PuOr", vmin=-1, vmax=1, interpolation="nearest")
    for place in (prompts[1:] != prompts[:-1]).nonzero()[0]:
        axes.axhline(place + 0.5, color=GREY, lw=0.6)
        axes.axvline(place + 0.5, color=GREY, lw=0.6)
    axes.figure.colorbar(image, ax=axes, label="cosine")
    axes.set(xlabel="completion", ylabel="completion")
    return axes


def plot_spectrum(axes: Axes, kernels: Mapping[str, pd.DataFrame]) -> Axes:
    """
    The eigenvalues of Fisher kernels, each divided by the kernel's trace, the largest first.

    Args:
        kernels: label -> `Run.kernel(step)`.
    """
    for (label, kernel), (color, marker) in zip(kernels.items(), itertools.cycle(SERIES)):
        values = spectrum_of(kernel)
        axes.plot(values.index, values / values.sum(), color=color, marker=marker, ms=3, lw=1, label=label)
    axes.set(xlabel="eigenvalue", ylabel="fraction of the trace", yscale="log")
    axes.set_ylim(1e-7, 2)  # below is rounding
    return finished(axes)


def plot_change_slope(axes: Axes, rows: Rows) -> Axes:
    """
    The slope of measured on predicted change of the completions' log-probabilities at each step, with 95 % intervals
    over prompts. A slope of 1 says that the first-order prediction holds.

    Args:
        rows: `Run.rows("fisher/change_slope")`.
    """
    key = "fisher/change_slope"
    rows = [row for row in rows if row.get(key) is not None]
    rows, part = thinned(rows)
    steps, slopes = series(rows, key)
    errors, name = half_widths(rows, key, "fisher/num_prompts")
    axes.axhline(1, color=GREY, lw=0.8)
    axes.errorbar(steps, slopes, errors, color=BLUE, fmt="o", ms=3, lw=0.8, capsize=2, label=f"one step, {name}{part}")
    axes.set(xlabel="optimizer step", ylabel="slope, measured on predicted")
    return finished(axes)
