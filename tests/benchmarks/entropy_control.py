"""
Which methods keep the entropy at a set-point, and what do they gain by it? Two tasks, 13 methods, five seeds each.

    python tests/benchmarks/entropy_control.py --output runs/entropy-control [--tasks sharpen explore] [--jobs 2]

Every method is tuned in the same way: four settings are trained once each with seed 100, and the best of them is
trained with seeds 0 to 4. For the task `sharpen` the best is the one whose ten-step means of the entropy after step 20
are nearest to the set-point; for `explore`, the one with the highest held-out reward after the last step.
`entropy_control_cell.py` describes the tasks and how a run is measured. Runs that exist are not repeated: after an
interruption the same command continues, and once all runs exist it only reports.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from entropy_control_cell import write_cell
from entropy_control_tables import distance, draw, report

Settings = dict[str, Any]
TASKS, TARGET = ("sharpen", "explore"), 0.22  # nats per token
TUNING_SEED, STEPS = 100, 60
BASELINE = {"kl_cov": "none, two iterations"}  # all other methods: "none"


def candidates(task: str) -> dict[str, list[Settings]]:
    """The settings of each method that are tried; `matched` has those that depend on another method's best setting."""
    budget = {"entropy_control": "hold", "entropy_control_target": TARGET}
    varied = [{"entropy_control_gain": gain} for gain in (0.2, 0.3, 0.4, 0.5)]
    if task == "explore":  # it is not known which entropy is best
        varied = [{"entropy_control_target": value} for value in (0.12, 0.17, 0.22, 0.27)]
    adaptive = {"use_adaptive_entropy": True, "entropy_target": TARGET}
    covariance = {"token_control": "clip_cov", "token_control_quantiles": True, "token_control_bounds": [0.8, 1.0]}
    two = {"num_iterations": 2}
    methods = {
        "none": [{}],
        "lower learning rate": [{"learning_rate": rate} for rate in (1.5e-4, 1e-4, 7e-5, 5e-5)],
        "higher temperature": [{"temperature": value} for value in (1.1, 1.3, 1.5, 1.6)],
        "fixed bonus": [{"entropy_coef": value} for value in (0.01, 0.03, 0.05, 0.1)],
        "adaptive bonus": [{**adaptive, "entropy_coef_delta": value} for value in (0.001, 0.003, 0.01, 0.03)],
        "clip_cov": [{**covariance, "token_control_fraction": share} for share in (0.003, 0.01, 0.03, 0.1)],
        "none, two iterations": [two],
        "kl_cov": [
            {**two, "token_control": "kl_cov", "token_control_fraction": 0.02, "token_control_coefficient": value}
            for value in (0.1, 0.5, 1.0, 10.0)
        ],
        "entropy_control, probe": [{**budget, **one} for one in varied],
        "entropy_control, rollouts": [{**budget, "entropy_control_completions": "rollouts", **one} for one in varied],
        "entropy_control, floor": [{**budget, "entropy_control": "floor", **one} for one in varied],
    }
    return methods | ({"positive control": [{"hint": True}]} if task == "explore" else {})


def matched(chosen: dict[str, Settings]) -> dict[str, Settings]:
    """Controls with random tokens, all or of positive advantage, as many as Clip-Cov may choose."""
    share = {"token_control_fraction": chosen["clip_cov"]["token_control_fraction"]}
    return {name.replace("_", " "): {"token_control": name, **share} for name in ("random", "random_positive")}


class Study:
    """Runs of one task, stored in a folder by their settings and seed."""

    def __init__(self, task: str, folder: Path, pool: ProcessPoolExecutor, steps: int) -> None:
        self.task, self.folder, self.pool, self.steps = task, folder / task, pool, steps

    def path(self, settings: Settings, seed: int) -> Path:
        described = json.dumps([settings, self.steps], sort_keys=True).encode()
        return self.folder / f"{hashlib.sha256(described).hexdigest()[:10]}-seed{seed}.json"

    def make(self, runs: Iterable[tuple[Settings, int]]) -> None:
        cells = [(self.path(*run), self.task, *run, self.steps) for run in runs]
        for done in [self.pool.submit(write_cell, *cell) for cell in cells]:
            done.result()

    def read(self, settings: Settings, seed: int) -> dict[str, Any]:
        return json.loads(self.path(settings, seed).read_text(encoding="utf-8"))

    def chosen(self) -> dict[str, Settings]:
        """For each method the setting that was best in its run with the tuning seed."""
        methods = candidates(self.task)
        self.make((settings, TUNING_SEED) for tried in methods.values() for settings in tried)
        best = {
            name: min(tried, key=lambda settings: self.loss(self.read(settings, TUNING_SEED)))
            for name, tried in methods.items()
        }
        return best | matched(best)

    def loss(self, run: dict[str, Any]) -> float:
        return distance(run, TARGET) if self.task == "sharpen" else -run["evaluations"][-1]["reward"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("--output", type=Path, default=Path("runs/entropy-control"))
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--jobs", type=int, default=2, help="number of runs at a time, with one thread each")
    parser.add_argument("--seeds", type=int, default=5, help="number of seeds; at least 2, for intervals")
    parser.add_argument("--figures", type=Path, help="folder for the figures (default: that of --output)")
    options = parser.parse_args()
    seeds = range(options.seeds)
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        for task in options.tasks:
            study = Study(task, options.output, pool, STEPS)
            chosen = study.chosen()
            study.make((settings, seed) for seed in seeds for settings in chosen.values())
            runs = {name: [study.read(settings, seed) for seed in seeds] for name, settings in chosen.items()}
            tried = [
                (name, study.read(settings, TUNING_SEED))
                for name, settings_of in candidates(task).items()
                for settings in settings_of
            ]
            print(report(task, runs, tried, TARGET, BASELINE), flush=True)
            draw(runs, tried, TARGET, (options.figures or options.output) / f"entropy-control-{task}.png")


if __name__ == "__main__":
    main()
