"""
Figures of a run, from the tables of `analysis.run` or the lines of `metrics.jsonl` (`Run.rows`).

Every function draws into the axes that it is given and returns them. The colours suit colour-blind readers too.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from trl_entropy.analysis.comparison import over_runs
from trl_entropy.analysis.run import cosines_of, spectrum_of
from trl_entropy.runs.metrics import PASS_AT_1, unit
from trl_entropy.runs.strict_json import Row

# Okabe and Ito's palette.
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#7F7F7F"
_SERIES = ((BLUE, "o"), (ORANGE, "s"), (GREEN, "^"), ("#CC79A7", "D"), ("#E69F00", "v"), ("#56B4E9", "P"))

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
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    return axes


def plot_reward(axes: Axes, metrics: Rows) -> Axes:
    """Mean reward of each step's own completions."""
    plot_key(axes, metrics, "reward", "training batch", BLUE, lw=1.2)
    axes.set(title="Reward", ylabel="mean reward")
    return axes


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
    _plot_held_out(axes, evaluation, PASS_AT_1)
    axes.set(title="Held-out pass@1", ylabel="fraction of completions correct", ylim=(0, 1))
    return axes


def plot_entropy_change(axes: Axes, metrics: Rows) -> Axes:
    """The entropy change of each probed step: measured, with 95 % intervals, and predicted to first order."""
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
    """
    Measured change on one half of the prompts against predicted change on the other, a point for each step, with 95 %
    intervals.

    Args:
        rows: `Run.rows("entropy/half_b_measured")`.
        predictor: `linear`, `second_order` or `trapezoid`; `linear` is drawn where the run does not have it.
    """
    predictor = predictor if f"entropy/half_a_{predictor}" in rows[0] else "linear"
    x, y = f"entropy/half_a_{predictor}", "entropy/half_b_measured"
    ends = [min(row[x] for row in rows), max(row[x] for row in rows)]
    axes.plot(ends, ends, color=GREY, lw=0.8, label="prediction = measurement")
    axes.errorbar(
        [row[x] for row in rows],
        [row[y] for row in rows],
        [1.96 * row[f"{y}_stderr"] for row in rows],
        [1.96 * row[f"{x}_stderr"] for row in rows],
        color=BLUE,
        fmt="o",
        ms=3,
        lw=0.7,
        label="one step, 95 %",
    )
    name = predictor.replace("_", " ")
    axes.set(xlabel=f"predicted ({name}), nats/token", ylabel="measured on other prompts, nats/token")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    return axes


def plot_integral(axes: Axes, integral: Mapping[str, Any]) -> Axes:
    """
    The entropy of freshly drawn completions at each step (95 %), and that at the start plus the predicted changes.

    Args:
        integral: `steps`, `fresh`, `fresh_stderr`, and by name of a prediction its `values`.
    """
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
    axes.set(xlabel="optimizer step", ylabel=unit("entropy/probe_batch"))
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    return axes


def plot_checkpoints(axes: Axes, evaluation: pd.DataFrame, metrics: Sequence[str], run: str = "") -> Axes:
    """
    Metrics of evaluated checkpoints over steps, with their 95 % intervals over prompts.

    Args:
        evaluation: `Run.evaluation`.
        metrics: names of metrics with the same unit.
        run: name of the run, put before each metric in the legend.
    """
    for metric, (color, marker) in zip(metrics, _SERIES, strict=False):
        rows = evaluation[evaluation["metric"] == metric].sort_values("step")
        values = rows["value"].astype(float)
        errors = [(values - rows["low"]).fillna(0), (rows["high"] - values).fillna(0)]
        label = f"{run} {metric}".strip()
        axes.errorbar(rows["step"], values, errors, color=color, marker=marker, ms=5, lw=1.3, capsize=3, label=label)
    axes.set(
        xlabel="optimizer step of the checkpoint", ylabel="fraction" if unit(metrics[0]) == "1" else unit(metrics[0])
    )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return _finished(axes)


def plot_positions(axes: Axes, positions: pd.DataFrame, column: str = "entropy", min_tokens: int = 10) -> Axes:
    """
    Entropy or surprisal by token position, a line for each checkpoint, with 95 % bands over prompts.

    Args:
        positions: `Run.positions`.
        column: `entropy` or `surprisal`.
        min_tokens: positions that fewer samples reach are left out.
    """
    steps = sorted(positions["step"].unique())
    for place, step in enumerate(steps):
        rows = positions[(positions["step"] == step) & (positions["num_tokens"] >= min_tokens)]
        color = colormaps["cividis"](0.9 * place / max(1, len(steps) - 1))
        axes.plot(rows["position"], rows[column], color=color, lw=1.3, label=f"step {step}")
        axes.fill_between(
            rows["position"], rows[f"{column}_low"], rows[f"{column}_high"], color=color, alpha=0.2, lw=0
        )
    axes.set(xlabel="token position in the completion", ylabel=f"{column}, nats/token")
    return _finished(axes)


def plot_runs(axes: Axes, steps: pd.DataFrame, key: str) -> Axes:
    """
    One key of several runs, a thin line each, with the mean over runs and its 95 % interval (Student's t).

    Args:
        steps: from `analysis.comparison.compare_runs`.
        key: a column of it.
    """
    given = steps[steps[key].notna()]
    for (run, rows), (color, marker) in zip(given.groupby("run"), itertools.cycle(_SERIES)):
        axes.plot(rows["step"], rows[key], color=color, marker=marker, ms=2, lw=0.7, alpha=0.7, label=str(run))
    mean = over_runs(given, key)
    if given["run"].nunique() > 1:
        axes.plot(mean.index, mean["mean"], color="black", lw=1.6, label="mean, 95 % over runs")
        axes.fill_between(mean.index, mean["low"], mean["high"], color="black", alpha=0.12, lw=0)
    axes.set(xlabel="optimizer step", ylabel=_with_unit(key))
    return _finished(axes)


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
    plot_key(axes, rows, key, f"noise scale ({metric})", BLUE, lw=1.4)
    bounded = [row for row in rows if _is_finite(row.get(f"{key}_lower"))]
    if closed := [row for row in bounded if _is_finite(row.get(f"{key}_upper"))]:
        low, high = ([row[f"{key}_{end}"] for row in closed] for end in ("lower", "upper"))
        axes.fill_between([row["step"] for row in closed], low, high, color=BLUE, alpha=0.2, lw=0, label="95 %")
    if without_end := [row for row in bounded if not _is_finite(row.get(f"{key}_upper"))]:
        steps, low = ([row[name] for row in without_end] for name in ("step", f"{key}_lower"))
        axes.plot(steps, low, color=BLUE, ls="none", marker="^", ms=4, label="95 %, no upper end")
    plot_key(axes, rows, "noise_scale/num_prompts", "prompts in a step", ORANGE, ls="--")
    axes.set(ylabel="prompts")
    axes.set_yscale("symlog", linthresh=10)
    return _finished(axes)


def plot_set_point(axes: Axes, rows: Rows, target: float | None = None) -> Axes:
    """
    The entropy before each step as `entropy_control` measures it, with 95 % intervals, and its target.

    Args:
        rows: `Run.rows("entropy_control/entropy")`.
        target: the setting `entropy_control_target`, in nats per token.
    """
    steps, values = series(rows, "entropy_control/entropy")
    errors = [1.96 * row["entropy_control/entropy_stderr"] for row in rows]
    axes.errorbar(steps, values, errors, color=BLUE, fmt="o", ms=3, lw=0.8, capsize=2, label="before the step, 95 %")
    if target is not None:
        axes.axhline(target, color=ORANGE, ls="--", label="target")
    axes.set(xlabel="optimizer step", ylabel=unit("entropy_control/entropy"))
    return _finished(axes)


def plot_controlled_change(axes: Axes, rows: Rows) -> Axes:
    """
    The entropy change of each step under `entropy_control`: predicted without and with the correction, and measured.

    Args:
        rows: `Run.rows("entropy_control/entropy")`.
    """
    plot_key(axes, rows, "entropy_control/delta_optimizer", "predicted, optimizer alone", GREY, lw=1.2)
    plot_key(axes, rows, "entropy_control/delta_predicted", "predicted, with correction", BLUE, lw=1.2)
    steps, values = series(rows, "entropy_control/realised_previous")
    axes.plot([step - 1 for step in steps], values, color=ORANGE, marker="o", ms=3, lw=0, label="measured")
    axes.axhline(0, color=GREY, lw=0.8)
    axes.set(ylabel=unit("entropy_control/delta_predicted"))
    return _finished(axes)


def plot_kernel(axes: Axes, kernel: pd.DataFrame) -> Axes:
    """
    The cosines of a Fisher kernel, completion by completion; lines separate the prompts.

    Args:
        kernel: `Run.kernel(step)`.
    """
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
    for (label, kernel), (color, marker) in zip(kernels.items(), itertools.cycle(_SERIES)):
        values = spectrum_of(kernel)
        axes.plot(values.index, values / values.sum(), color=color, marker=marker, ms=3, lw=1, label=label)
    axes.set(xlabel="eigenvalue", ylabel="fraction of the trace", yscale="log")
    axes.set_ylim(1e-7, 2)  # below is rounding
    return _finished(axes)


def plot_change_slope(axes: Axes, rows: Rows) -> Axes:
    """
    The slope of measured on predicted change of the completions' log-probabilities at each step, with 95 % intervals
    over prompts. A slope of 1 says that the first-order prediction holds.

    Args:
        rows: `Run.rows("fisher/change_slope")`.
    """
    steps, slopes = series(rows, "fisher/change_slope")
    errors = [1.96 * row["fisher/change_slope_stderr"] for row in rows]
    axes.axhline(1, color=GREY, lw=0.8)
    axes.errorbar(steps, slopes, errors, color=BLUE, fmt="o", ms=3, lw=0.8, capsize=2, label="one step, 95 %")
    axes.set(xlabel="optimizer step", ylabel="slope, measured on predicted")
    return _finished(axes)


def plot_tokens(axes: Axes, tokens: pd.DataFrame, column: str = "entropy") -> Axes:
    """One completion, a bar for each token, in nats."""
    axes.bar(range(len(tokens)), tokens[column], color=BLUE)
    axes.set_xticks(range(len(tokens)), _labels(tokens["token"]), rotation=90, fontsize=8)
    axes.set(xlabel="token", ylabel=f"{column}, nats")
    axes.spines[["top", "right"]].set_visible(False)
    return axes


def plot_high_entropy_tokens(axes: Axes, table: pd.DataFrame, num_tokens: int = 12) -> Axes:
    """
    The tokens with the largest share of the entropy, the largest on top; how often each was drawn stands at its bar.

    Args:
        table: from `analysis.run.high_entropy_tokens`.
        num_tokens: how many at most.
    """
    rows = table.head(num_tokens)[::-1]
    axes.barh(range(len(rows)), rows["share_of_entropy"], color=BLUE)
    for place, (share, count) in enumerate(zip(rows["share_of_entropy"], rows["count"], strict=True)):
        axes.annotate(f" {count}", (share, place), va="center", fontsize=8)
    axes.set_yticks(range(len(rows)), _labels(rows.index), fontsize=8)
    axes.set(xlabel="share of all entropy (number of draws at the bar)", ylabel="token")
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.12)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    return axes


def _labels(tokens: Iterable[str]) -> list[str]:
    return [repr(token)[1:-1].replace("$", r"\$") for token in tokens]


def _is_finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _with_unit(key: str) -> str:
    return f"{key}, {unit(key)}" if unit(key) not in ("", "1", key) else key


def _finished(axes: Axes) -> Axes:
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize="small")
    return axes


def plot_entropy(axes: Axes, metrics: Rows, evaluation: Rows) -> Axes:
    """The policy's entropy on the training batches and on held-out prompts."""
    plot_key(axes, metrics, "entropy/policy", "training batch", BLUE, lw=1.2)
    _plot_held_out(axes, evaluation, "entropy")
    axes.set(title="Policy entropy", ylabel=unit("entropy/policy"))
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    return axes


def plot_shares(axes: Axes, shares: pd.DataFrame, title: str = "") -> Axes:
    """
    Each category's share of an entropy change with its 95 % interval, and its share of the tokens.

    Args:
        shares: from `analysis.attribution.shares`; infinite ends of intervals are drawn to the edge of the figure.
        title: what the categories divide.
    """
    places = range(len(shares))
    axes.barh(places, shares["share"], height=0.55, color=BLUE, label="of the change")
    edge = 1.5 * max(1.0, shares["share"].abs().max())
    low, high = shares["low"].clip(lower=-edge), shares["high"].clip(upper=edge)
    errors = [(shares["share"] - low).clip(lower=0), (high - shares["share"]).clip(lower=0)]
    axes.errorbar(shares["share"], places, xerr=errors, fmt="none", ecolor="black", lw=1, capsize=3, label="95 %")
    axes.plot(shares["token_share"], places, ls="", marker="D", ms=5, color=ORANGE, label="of the tokens")
    axes.axvline(0, color=GREY, lw=0.8)
    axes.set_yticks(places, [str(name).replace("_", ", ") for name in shares.index])
    axes.invert_yaxis()
    axes.set(xlabel="share", title=title)
    _finished(axes).legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=3, fontsize=8)
    return axes
