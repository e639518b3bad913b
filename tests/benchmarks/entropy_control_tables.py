"""Tables and figure of the study of entropy control (`entropy_control.py`)."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from entropy_control_cell import FROM
from measuring import interval as mean_interval

from trl_entropy.experiments.output import saved_figure

Run = dict[str, Any]
Runs = dict[str, list[Run]]
WINDOW = 10  # steps


def windows(run: Run) -> np.ndarray:
    """Means of the entropy over windows of ten steps, after step 20."""
    entropy = np.array([value for step, value in run["entropy"].items() if int(step) > FROM])
    return entropy[: len(entropy) // WINDOW * WINDOW].reshape(-1, WINDOW).mean(axis=1)


def deviations(run: Run, target: float) -> np.ndarray:
    """Relative deviations of these means from the run's set-point, or from `target` if it has none of its own."""
    return windows(run) / run["settings"].get("entropy_control_target", target) - 1


def distance(run: Run, target: float) -> float:
    """Root mean square of these deviations."""
    return float(np.sqrt(np.mean(deviations(run, target) ** 2)))


def interval(values: Iterable[float]) -> str:
    """Mean and 95 % interval (Student's t) over seeds."""
    return "{:.3f} [{:.3f}, {:.3f}]".format(*mean_interval(values))


def last(run: Run, quantity: str) -> float:
    return run["evaluations"][-1][quantity]


def at_cost(run: Run, quantity: str, seconds: float) -> float:
    """The quantity after so many CPU seconds of training, interpolated; the last value if the run took fewer."""
    costs = [run["seconds"][entry["step"] - 1] for entry in run["evaluations"]]
    return float(np.interp(seconds, costs, [entry[quantity] for entry in run["evaluations"]]))


def report(task: str, runs: Runs, tried: list[tuple[str, Run]], target: float, baseline: dict[str, str]) -> str:
    measured = [holding(runs, target), buying(runs, baseline), by_seed(runs), against(runs), control(runs)]
    return "\n\n".join([f"# {task}, set-point {target}", *measured, tuning(tried, target)])


def holding(runs: Runs, target: float) -> str:
    """Table: how near to the set-point each method keeps the entropy."""
    lines = [
        "| method | setting | ten-step means within 5 % | their rms distance | mean over set-point | "
        "lowest, highest | cost of a step |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, own in runs.items():
        means = [deviations(run, target) for run in own]
        inside = sum(int((abs(one) <= 0.05).sum()) for one in means)
        total = sum(map(len, means))
        cost = interval(run["seconds"][-1] / none["seconds"][-1] for run, none in zip(own, runs["none"], strict=True))
        lines.append(
            f"| {name} | {setting(own[0])} | {inside} of {total} | {math.sqrt(np.mean(np.square(means))):.1%} | "
            f"{np.mean(means):+.1%} | {np.min(means):+.1%}, {np.max(means):+.1%} | {cost} |"
        )
    return "\n".join(lines)


def buying(runs: Runs, baseline: dict[str, str]) -> str:
    """Table: held-out results after the last step, paired differences from the baseline, also at equal CPU time."""
    quantities = ("entropy", "reward", "pass@1", "pass@8")
    lines = [
        f"| method | {' | '.join(quantities)} | entropy less baseline's | pass@1 less | pass@8 less | "
        "pass@1 less, equal CPU time |",
        "|---" * (len(quantities) + 5) + "|",
    ]
    for name, own in runs.items():
        others = runs[baseline.get(name, "none")]
        pairs = list(zip(own, others, strict=True))
        cells = [interval(last(run, quantity) for run in own) for quantity in quantities]
        cells += [interval(last(a, k) - last(b, k) for a, b in pairs) for k in ("entropy", "pass@1", "pass@8")]
        cells.append(interval(_at_equal_cost(a, b) for a, b in pairs))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _at_equal_cost(run: Run, other: Run) -> float:
    seconds = min(run["seconds"][-1], other["seconds"][-1])
    return at_cost(run, "pass@1", seconds) - at_cost(other, "pass@1", seconds)


def by_seed(runs: Runs) -> str:
    """Table: held-out results after the last step of each run."""
    lines = ["| method | pass@1 of each seed | pass@8 of each seed |", "|---|---|---|"]
    for name, own in runs.items():
        ends = (" ".join(f"{last(run, quantity):.3f}" for run in own) for quantity in ("pass@1", "pass@8"))
        lines.append(f"| {name} | {' | '.join(ends)} |")
    return "\n".join(lines)


def against(runs: Runs) -> str:
    """Table: entropy control minus each other method, after the last step, paired by seed."""
    budgets = [name for name in runs if name.startswith("entropy_control")]
    columns = [(name, quantity) for name in budgets for quantity in ("reward", "pass@8")]
    lines = [f"| less | {' | '.join(f'{name}: {quantity}' for name, quantity in columns)} |"]
    lines.append("|---" * (len(columns) + 1) + "|")
    for other in [name for name in runs if name not in budgets]:
        cells = [
            interval(last(a, quantity) - last(b, quantity) for a, b in zip(runs[name], runs[other], strict=True))
            for name, quantity in columns
        ]
        lines.append(f"| {other} | {' | '.join(cells)} |")
    return "\n".join(lines)


def control(runs: Runs) -> str:
    """Table: realised over predicted net change of the entropy control, and how large its corrections were."""
    lines = [
        "| source | realised / predicted, sums | correction, in lengths of the step | infeasible steps | "
        "optimizer's own change, 1e-3 nats/token | switched off |",
        "|---|---|---|---|---|---|",
    ]
    for name, own in runs.items():
        logged = [run["logged"] for run in own if "entropy_control/active" in run["logged"]]
        if not logged:
            continue
        realised = [sum(one["entropy_control/realised_previous"][1:]) for one in logged]
        predicted = [sum(one["entropy_control/delta_predicted"][:-1]) for one in logged]
        sums = [one / other for one, other in zip(realised, predicted, strict=True)]
        lines.append(
            f"| {name} | {interval(sums)} | {interval(_mean(one, 'relative_size') for one in logged)} | "
            f"{interval(_mean(one, 'infeasible') for one in logged)} | "
            f"{interval(1e3 * _mean(one, 'delta_optimizer') for one in logged)} | "
            f"{sum(one['entropy_control/active'][-1] == 0 for one in logged)} of {len(logged)} |"
        )
    return "\n".join(lines) if len(lines) > 2 else ""


def _mean(logged: dict[str, list[float]], name: str) -> float:
    """Mean over the steps after `FROM`, by which the set-point is reached."""
    return statistics.mean(logged[f"entropy_control/{name}"][FROM:])


def tuning(tried: list[tuple[str, Run]], target: float) -> str:
    """Table: results of each setting with the tuning seed."""
    columns = ("method", "setting", "rms distance", "entropy", "reward", "pass@1", "pass@8")
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for name, run in tried:
        values = " | ".join(f"{last(run, quantity):.3f}" for quantity in ("entropy", "reward", "pass@1", "pass@8"))
        lines.append(f"| {name} | {setting(run)} | {distance(run, target):.1%} | {values} |")
    return "\n".join(lines)


def setting(run: Run) -> str:
    """The fields that differ between the settings of a method."""
    varied = (
        "learning_rate", "temperature", "entropy_coef", "entropy_coef_delta", "token_control_fraction",
        "token_control_coefficient", "entropy_control_gain", "entropy_control_target",
    )  # fmt: skip
    return ", ".join(f"{name} {run['settings'][name]:g}" for name in varied if name in run["settings"])


def draw(runs: Runs, tried: list[tuple[str, Run]], target: float, path: Path) -> None:
    """Draw entropy over steps, and pass@1, pass@8 against entropy at the end: means, 95 % intervals (tuning: x)."""
    from matplotlib import colormaps

    path.parent.mkdir(parents=True, exist_ok=True)
    colors = dict(zip(runs, colormaps["tab20"].colors, strict=False))
    with saved_figure(path, (15, 5)) as figure:
        _draw_into(figure.subplots(1, 3), runs, tried, target, colors)


def _draw_into(all_axes, runs: Runs, tried: list[tuple[str, Run]], target: float, colors: dict[str, Any]) -> None:
    left, *frontiers = all_axes
    for name, own in runs.items():
        entropy = np.mean([list(run["entropy"].values()) for run in own], axis=0)
        left.plot([int(step) for step in own[0]["entropy"]], entropy, color=colors[name], lw=1.2, label=name)
    left.axhline(target, color="grey", lw=0.8, ls="--")
    left.set(xlabel="step", ylabel="entropy of fresh completions, nats/token")
    left.set_ylim(top=min(2 * target, left.get_ylim()[1]))
    left.legend(fontsize=7, ncols=2)
    for axes, quantity in zip(frontiers, ("pass@1", "pass@8"), strict=True):
        for name, own in runs.items():
            ends = [mean_interval([last(run, key) for run in own]) for key in ("entropy", quantity)]
            (x, low_x, _), (y, low_y, _) = ends
            axes.errorbar(x, y, y - low_y, x - low_x, fmt="o", color=colors[name], capsize=2)
        axes.axvline(target, color="grey", lw=0.8, ls="--")
        limits = {"xlim": axes.get_xlim(), "ylim": axes.get_ylim()}
        for name, run in tried:  # the axes leave out those that lie far away; the table has them
            axes.plot(last(run, "entropy"), last(run, quantity), "x", color=colors[name], ms=5)
        axes.set(xlabel="entropy after the last step, nats/token", ylabel=f"held-out {quantity}", **limits)
