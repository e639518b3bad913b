"""
Do curriculum and resampling help? Held-out pass@1 and entropy on the embedded task, by completions generated.

    python tests/benchmarks/prompt_selection.py --output runs/prompt-selection

Trains every arm (curriculum off or on, resampling off or on) with every seed, one run after the other, from the same
warm start and on the same problems. Runs that are complete are not repeated, so that after an interruption the same
command continues. Each arm is compared with the arm without either toggle, with runs paired by seed and Student's t
over seeds. Runs are evaluated every few steps; between two evaluations, values are interpolated linearly in the number
of completions generated. This understates a curve that bends, most where its evaluations are far apart: prefer the
comparisons late in training.
"""

from __future__ import annotations

import argparse
import itertools
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from measuring import interval as mean_interval

from trl_entropy.experiments.output import saved_figure
from trl_entropy.runs.directory import RunDirectory

CONFIG = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
ARMS = {
    "neither": (),
    "curriculum": ("--curriculum", "pass_rate"),
    "resampling": ("--resample_uninformative_groups", "true"),
    "both": ("--curriculum", "pass_rate", "--resample_uninformative_groups", "true"),
}
# 40 steps draw 640 prompts: of 4096 problems hardly any would come twice, and pass rates would never be used.
SETTINGS = (
    *("--num_train_problems", "256", "--eval_steps", "10", "--save_strategy", "no", "--log_completions", "false"),
    *("--report_to", "none", "--entropy_probe", "false", "--effective_sample_size_probe", "false"),
    *("--optimizer_state_probe", "false", "--kl_every", "0"),
)
QUANTITIES = {"pass@1": "rewards/tag_pref/mean", "entropy": "entropy"}


class Curve(NamedTuple):
    """One run: the completions generated up to each evaluation, and the values measured there."""

    completions: np.ndarray
    values: dict[str, np.ndarray]
    steps: np.ndarray
    cost: float  # completions generated for each informative group trained on
    kept: float  # share of groups trained on whose rewards are all equal
    rounds: float  # further rounds of generation per step, after the first
    unused: float  # share of informative groups that were not needed
    seconds: float  # share of the steps' time that replacing groups takes

    def at(self, quantity: str, completions: float) -> float:
        return float(np.interp(completions, self.completions, self.values[quantity]))


def train(folder: Path, arm: str, seed: int, steps: int) -> None:
    """Make one run, unless it is complete."""
    if is_complete(folder, steps):
        return
    shutil.rmtree(folder, ignore_errors=True)
    command = [sys.executable, "-m", "trl_entropy.train", "--config", str(CONFIG), "--output_dir", str(folder)]
    command += ["--seed", str(seed), "--max_steps", str(steps), *SETTINGS, *ARMS[arm]]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def is_complete(folder: Path, steps: int) -> bool:
    return any(row["step"] == steps for row in RunDirectory(folder).evaluation())


def curve_of(folder: Path, last_step: int, prompts: int = 16, generations: int = 8) -> Curve:
    run = RunDirectory(folder)
    rows, evaluation = ([row for row in of if row["step"] <= last_step] for of in (run.metrics(), run.evaluation()))
    informative, generated = [], []
    for row in rows:
        kept = row.get("resampling/num_kept_uninformative", prompts * row["frac_reward_zero_std"])
        informative.append(prompts - kept)
        generated.append(row.get("resampling/num_completions", prompts * generations))
    totals = np.concatenate([[0], np.cumsum(generated)])
    steps = np.array([row["step"] for row in evaluation])
    values = {name: np.array([row[key] for row in evaluation]) for name, key in QUANTITIES.items()}
    cost, kept = sum(generated) / sum(informative), 1 - sum(informative) / (prompts * len(rows))
    unused = total(rows, "resampling/num_unused")
    rounds, seconds = total(rows, "resampling/num_rounds") / len(rows), total(rows, "time/resampling")
    of_step = seconds / total(rows, "step_time")
    return Curve(totals[steps], values, steps, cost, kept, rounds, unused / (unused + sum(informative)), of_step)


def total(rows: list[dict], key: str) -> float:
    return sum(row.get(key, 0.0) for row in rows)


def interval(values: Iterable[float]) -> str:
    return "{:+.3f} [{:+.3f}, {:+.3f}]".format(*mean_interval(values))


def table(curves: dict[str, list[Curve]], budget: float) -> str:
    lines = [
        f"at {budget:.0f} completions; differences from `neither`, mean over seeds [95 %]",
        "| arm | steps made | " + " | ".join(f"{name} | its difference" for name in QUANTITIES) + " |",
        "|---" * (2 + 2 * len(QUANTITIES)) + "|",
    ]
    for arm, own in curves.items():
        cells = [arm, f"{statistics.mean(np.interp(budget, c.completions, c.steps) for c in own):.0f}"]
        for name in QUANTITIES:
            pairs = list(zip(own, curves["neither"], strict=True))
            cells.append(f"{statistics.mean(c.at(name, budget) for c in own):.3f}")
            cells.append(interval(c.at(name, budget) - o.at(name, budget) for c, o in pairs))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def costs(curves: dict[str, list[Curve]]) -> str:
    """Table: the cost of each arm over all of its steps."""
    columns = {
        "completions per informative group": ("cost", ".1f"),
        "groups without gradient": ("kept", ".1%"),
        "further rounds a step": ("rounds", ".2f"),
        "informative groups not used": ("unused", ".1%"),
        "time of a step for replacing": ("seconds", ".0%"),
    }
    lines = ["over all steps", "| arm | " + " | ".join(columns) + " |", "|---" * (1 + len(columns)) + "|"]
    for arm, own in curves.items():
        cells = [format(statistics.mean(getattr(c, name) for c in own), form) for name, form in columns.values()]
        lines.append("| " + " | ".join([arm, *cells]) + " |")
    return "\n".join(lines)


def equal_steps(curves: dict[str, list[Curve]]) -> str:
    """Table: differences after the last step, however many completions were generated up to it."""
    lines = ["after the last step of all arms, whatever was generated", "| arm | " + " | ".join(QUANTITIES) + " |"]
    lines.append("|---" * (1 + len(QUANTITIES)) + "|")
    for arm, own in curves.items():
        pairs = list(zip(own, curves["neither"], strict=True))
        cells = [interval(c.values[name][-1] - o.values[name][-1] for c, o in pairs) for name in QUANTITIES]
        lines.append("| " + " | ".join([arm, *cells]) + " |")
    return "\n".join(lines)


def draw(curves: dict[str, list[Curve]], target: Path) -> None:
    with saved_figure(target, (10, 4)) as figure:
        axes = figure.subplots(1, 2)
        for axis, name in zip(axes, QUANTITIES, strict=True):
            for arm, own in curves.items():
                generated = np.mean([c.completions for c in own], axis=0)  # mean over seeds at each evaluation
                values = np.array([c.values[name] for c in own])
                errors = values.std(0, ddof=1) / len(own) ** 0.5
                axis.errorbar(generated, values.mean(0), errors, label=arm, capsize=2)
            axis.set(xlabel="completions generated", ylabel=f"held-out {name}" + ", nats/token" * (name == "entropy"))
        axes[0].legend()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("--output", type=Path, default=Path("runs/prompt-selection"))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=40, help="steps of a run; a multiple of 10")
    parser.add_argument("--figure", type=Path, help="file of the figure (default: prompt-selection.png in --output)")
    options = parser.parse_args()
    pairs = itertools.product(range(options.seeds), ARMS)
    cells = {(arm, seed): options.output / f"{arm}-seed{seed}" for seed, arm in pairs}
    for (arm, seed), folder in cells.items():
        train(folder, arm, seed, options.steps)
    curves = {arm: [curve_of(cells[arm, seed], options.steps) for seed in range(options.seeds)] for arm in ARMS}
    budget = min(curve.completions[-1] for own in curves.values() for curve in own)
    for share in (2 / 3, 1):
        print(table(curves, share * budget), end="\n\n")
    print(equal_steps(curves), costs(curves), sep="\n\n")
    draw(curves, options.figure or options.output / "prompt-selection.png")


if __name__ == "__main__":
    main()
