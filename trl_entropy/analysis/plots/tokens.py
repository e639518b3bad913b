"""Figures of evaluated checkpoints, of tokens, and of what changed the entropy."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from trl_entropy.analysis.attribution import outcome_text
from trl_entropy.analysis.plots.axes import BLUE, GREY, ORANGE, SERIES, finished, labels, nothing
from trl_entropy.runs.metrics import unit


def plot_checkpoints(axes: Axes, evaluation: pd.DataFrame, metrics: Sequence[str], run: str = "") -> Axes:
    """
    Metrics of evaluated checkpoints over steps, with their 95 % intervals over prompts.

    Args:
        evaluation: `Run.evaluation`.
        metrics: names of metrics with the same unit.
        run: name of the run, put before each metric in the legend.
    """
    evaluation = evaluation[evaluation["metric"].isin(metrics)]
    if evaluation.empty:
        return nothing(
            axes, f"No checkpoint was evaluated for {', '.join(metrics)}. Run trl-entropy evaluate --run RUN."
        )
    for metric, (color, marker) in zip(metrics, SERIES, strict=False):
        rows = evaluation[evaluation["metric"] == metric].sort_values("step")
        values = rows["value"].astype(float)
        errors = [(values - rows["low"]).fillna(0), (rows["high"] - values).fillna(0)]
        label = f"{run} {metric}".strip()
        axes.errorbar(rows["step"], values, errors, color=color, marker=marker, ms=5, lw=1.3, capsize=3, label=label)
    axes.set(
        xlabel="optimizer step of the checkpoint", ylabel="fraction" if unit(metrics[0]) == "1" else unit(metrics[0])
    )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return finished(axes)


def plot_positions(axes: Axes, positions: pd.DataFrame, column: str = "entropy", min_tokens: int = 10) -> Axes:
    """
    Entropy or surprisal by token position, a line for each checkpoint, with 95 % bands over prompts.

    Args:
        positions: `Run.positions`.
        column: `entropy` or `surprisal`.
        min_tokens: positions that fewer samples reach are left out.
    """
    if positions.empty:
        return nothing(axes, "No checkpoint was evaluated. Run trl-entropy evaluate --run RUN.")
    steps = sorted(positions["step"].unique())
    for place, step in enumerate(steps):
        rows = positions[(positions["step"] == step) & (positions["num_tokens"] >= min_tokens)]
        color = colormaps["cividis"](0.9 * place / max(1, len(steps) - 1))
        axes.plot(rows["position"], rows[column], color=color, lw=1.3, label=f"step {step}")
        axes.fill_between(
            rows["position"], rows[f"{column}_low"], rows[f"{column}_high"], color=color, alpha=0.2, lw=0
        )
    axes.set(xlabel="token position in the completion", ylabel=f"{column}, nats/token")
    return finished(axes)


def plot_tokens(axes: Axes, tokens: pd.DataFrame, column: str = "entropy") -> Axes:
    """One completion, a bar for each token, in nats."""
    if tokens.empty:
        return nothing(axes, "There is no completion to show.")
    axes.bar(range(len(tokens)), tokens[column], color=BLUE)
    axes.set_xticks(range(len(tokens)), labels(tokens["token"]), rotation=90, fontsize=8)
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
    rows = table.dropna(subset=["share_of_entropy"]).head(num_tokens)[::-1]
    if rows.empty:
        return nothing(axes, "No token was drawn often enough.")
    axes.barh(range(len(rows)), rows["share_of_entropy"], color=BLUE)
    for place, (share, count) in enumerate(zip(rows["share_of_entropy"], rows["count"], strict=True)):
        axes.annotate(f" {count}", (share, place), va="center", fontsize=8)
    axes.set_yticks(range(len(rows)), labels(rows.index), fontsize=8)
    axes.set(xlabel="share of all entropy (number of draws at the bar)", ylabel="token")
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.12)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    return axes


def plot_shares(axes: Axes, shares: pd.DataFrame, title: str = "") -> Axes:
    """
    What each category of tokens adds to an entropy change, with its 95 % interval, beside what it would add if all
    tokens changed the entropy alike. Its share of the change stands at its bar, where there are shares.

    Args:
        shares: from `analysis.attribution.shares`.
        title: what the categories divide.
    """
    axes.set_title(title)
    if shares.empty:
        return nothing(axes, "No step attributed its entropy change. Train with entropy_attribution: token.")
    places, change = range(len(shares)), shares["change"]
    axes.barh(places, change, height=0.55, color=BLUE, label="part of the change")
    errors = [(change - shares["change_low"]).fillna(0), (shares["change_high"] - change).fillna(0)]
    axes.errorbar(change, places, xerr=errors, fmt="none", ecolor="black", lw=1, capsize=3, label="95 %")
    alike = shares["token_share"] * change.sum()
    axes.plot(alike, places, ls="", marker="D", ms=5, color=ORANGE, label="if all tokens were alike")
    ends = shares[["change_high", "change"]].max(axis=1)
    for place, (share, end) in enumerate(zip(shares["share"], ends, strict=True)):
        if math.isfinite(share):
            axes.annotate(f" {share:.0%}", (max(end, 0.0), place), va="center", fontsize=8)
    axes.axvline(0, color=GREY, lw=0.8)
    axes.set_yticks(places, [outcome_text(name) for name in shares.index])
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.set(xlabel="nats/token and step" if shares["share"].notna().any() else "nats/token and step (no shares)")
    finished(axes).legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2, fontsize=8)
    return axes


def plot_prices(axes: Axes, prices: pd.DataFrame, title: str = "") -> Axes:
    """
    What each category of tokens paid in entropy for what it earned in reward, with 95 % intervals. The line is the
    price of all of them: above it entropy was dearer. Categories whose price has bounds have it at their point.

    Args:
        prices: from `analysis.attribution.prices`.
        title: what the categories divide.
    """
    axes.set_title(title)
    if prices.empty:
        return nothing(axes, "No step attributed its change of reward. Train with reward_attribution: true.")
    for place, (name, row) in enumerate(prices.iterrows()):
        ends = [[[row[what] - row[f"{what}_low"]], [row[f"{what}_high"] - row[what]]] for what in ("earned", "lost")]
        errors = [[[max(end, 0.0) if math.isfinite(end) else 0.0 for end in side] for side in one] for one in ends]
        color, marker = SERIES[place % len(SERIES)]
        bounded = math.isfinite(row["low"]) and math.isfinite(row["high"])
        price = f"{row['price']:.2g} [{row['low']:.2g}, {row['high']:.2g}]" if bounded else "no price"
        axes.errorbar(
            row["earned"], row["lost"], xerr=errors[0], yerr=errors[1], fmt=marker, ms=5, lw=1, capsize=2, color=color,
            label=f"{outcome_text(name)}: {price}",
        )  # fmt: skip
    if math.isfinite(prices.loc["all", "price"]):
        axes.axline((0, 0), slope=prices.loc["all", "price"], color=GREY, lw=0.8, ls="--")
    axes.axhline(0, color=GREY, lw=0.5)
    axes.axvline(0, color=GREY, lw=0.5)
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.set(xlabel="reward earned a step", ylabel="nats/token lost a step")
    finished(axes).legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.2), fontsize=7)
    return axes
