"""
Does a control of the entropy beat a tuned learning rate where entropy pays? The task `trap`, as pre-registered.

    python tests/benchmarks/control_study.py [--jobs 2] [--minutes 60] [--report]

docs/results/trap.md says what was decided before the first run: hypotheses, methods, seeds, tuning, analysis. Every
finished run is one line of docs/results/study/trap.jsonl, which is the cache: the command makes the runs that are
missing there, in an order in which all methods of a group have equally many seeds; then it writes
docs/results/study/trap.md (tables) and docs/figures/control-study-trap.png. `--report` makes no run. To make all runs
anew, name another file with `--results`.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import subprocess
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from datetime import UTC, datetime
from multiprocessing import get_context
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[2]
RESULTS = REPOSITORY / "docs" / "results" / "study" / "trap.jsonl"
FIGURE = REPOSITORY / "docs" / "figures" / "control-study-trap.png"
TASK, BATCH, COMPLETIONS = "trap", 128, 19_200  # 150 steps of 128 completions
TUNING_SEEDS, SEEDS = (1, 5), range(10, 20)
EVERY = 5  # steps between the points of a curve that are kept

Settings = dict[str, Any]
Run = dict[str, Any]

METHODS: dict[str, list[Settings]] = {
    "none": [{}],
    "lower learning rate": [{"learning_rate": rate} for rate in (2e-4, 1.5e-4, 1e-4)],
    "floor": [{"entropy_control": "floor", "entropy_control_target": target} for target in (0.08, 0.11, 0.15)],
    "clip_cov, largest": [
        {"token_control": "clip_cov", "token_control_choice": "largest", "token_control_fraction": share}
        for share in (0.003, 0.01, 0.03)
    ],
    "learning rate with a schedule": [
        {"lr_scheduler_type": "linear", "learning_rate": 3e-4},
        {"lr_scheduler_type": "linear", "learning_rate": 2e-4},
        {"lr_scheduler_type": "cosine", "learning_rate": 3e-4},
    ],
    "larger batch": [
        {"per_device_train_batch_size": 256, "num_prompts_per_step": 32, "learning_rate": rate}
        for rate in (2e-4, 3e-4, 4.2e-4)
    ],
    "resampling": [{"resample_uninformative_groups": True, "learning_rate": rate} for rate in (3e-4, 2e-4, 1.5e-4)],
    "fixed bonus": [{"entropy_coef": value} for value in (0.002, 0.005, 0.01)],
    "floor with a release": [
        {"entropy_control": "floor", "entropy_control_target": 0.15, "entropy_control_release": reward}
        for reward in (0.5, 0.65, 0.75)
    ],
    "exchange": [
        {"token_control": "exchange", "token_control_fraction": 0.01, "token_control_floor": floor}
        for floor in (0.08, 0.11, 0.15)
    ],
    "A (S + H), largest": [
        {
            "token_control": "clip_cov",
            "token_control_choice": "largest",
            "token_control_centre": "distribution",
            "token_control_fraction": share,
        }
        for share in (0.003, 0.01, 0.03)
    ],
}
# Within a group the seeds are made in turn, so that methods that are compared have equally many.
GROUPS = (
    ("none",),
    ("lower learning rate",),
    ("clip_cov, largest",),
    ("floor",),
    ("learning rate with a schedule",),
    ("larger batch", "resampling", "fixed bonus"),
    ("floor with a release",),
    ("exchange",),
    ("A (S + H), largest",),
)


def num_steps(settings: Settings) -> int:
    """As many steps as make `COMPLETIONS` completions of training, those that resampling adds apart."""
    return COMPLETIONS // settings.get("per_device_train_batch_size", BATCH)


def key_of(settings: Settings, seed: int) -> str:
    """What says which run it is."""
    return json.dumps([TASK, settings, num_steps(settings), seed], sort_keys=True)


def read_runs(path: Path) -> dict[str, Run]:
    """The finished runs of a file by [`key_of`]; a last line that was cut off is left out."""
    found = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            run = json.loads(line)
        except json.JSONDecodeError:
            continue
        found[key_of(run["settings"], run["seed"])] = run
    return found


def chosen(method: str, runs: dict[str, Run]) -> Settings | None:
    """The setting of the highest mean reward over the tuning seeds; None while a tuning run is missing."""
    tried = METHODS[method]
    if len(tried) == 1:
        return tried[0]
    keys = [[key_of(settings, seed) for seed in TUNING_SEEDS] for settings in tried]
    if any(key not in runs for of_setting in keys for key in of_setting):
        return None
    rewards = [statistics.mean(at_completions(runs[key], "reward") for key in of_setting) for of_setting in keys]
    return tried[rewards.index(max(rewards))]


def missing(runs: dict[str, Run], methods: Iterable[str]) -> Iterator[tuple[str, Settings, int]]:
    """Method, settings and seed of the runs that can be made next, in order: fresh seeds once a method is tuned."""
    for group in GROUPS:
        own = [method for method in group if method in methods]
        planned = [
            (method, settings, seed)
            for method in own
            if len(METHODS[method]) > 1
            for seed in TUNING_SEEDS
            for settings in METHODS[method]
        ]
        tuned = {method: settings for method in own if (settings := chosen(method, runs)) is not None}
        planned += [(method, settings, seed) for seed in SEEDS for method, settings in tuned.items()]
        yield from (one for one in planned if key_of(*one[1:]) not in runs)


def make_run(settings: Settings, seed: int) -> Run:
    """Train, and keep what a line of the results holds; entropy in nats per token of training's own completions."""
    from entropy_control_cell import run_cell

    of_package = version()  # of the code that trains, whatever becomes of the files meanwhile
    run = run_cell(TASK, settings, seed, num_steps(settings))
    logged, batch = run["logged"], settings.get("per_device_train_batch_size", BATCH)
    drawn = logged.get("resampling/num_completions") or [batch] * run["steps"]
    evaluations = [
        {
            **{name: _rounded(value, 4) for name, value in entry.items()},
            "seconds": round(run["seconds"][entry["step"] - 1], 1),
            "completions": int(sum(drawn[: entry["step"]])),
        }
        for entry in run["evaluations"]
    ]
    curves = {name: [_rounded(value, 3) for value in logged[name][::EVERY]] for name in ("entropy/policy", "reward")}
    return {
        "task": TASK, "settings": settings, "seed": seed, "steps": run["steps"], "version": of_package,
        "date": datetime.now(UTC).strftime("%Y-%m-%d"), "unit": round(statistics.mean(run["units"]), 4),
        "evaluations": evaluations, **curves,
    }  # fmt: skip


def _rounded(value: float | None, digits: int) -> float | None:
    return None if value is None else round(value, digits)  # None: nan, in a run that blew up


@functools.cache
def version() -> str:
    """The last commit that changed the package, with a + if files of it are changed and not committed."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(REPOSITORY), *words], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    return git("log", "-1", "--format=%h", "--", "trl_entropy") + ("+" if git("diff", "HEAD", "trl_entropy") else "")


def at_completions(run: Run, quantity: str, completions: float = COMPLETIONS) -> float:
    """The quantity of held-out completions after so many of training, between two evaluations by a straight line."""
    import numpy as np

    entries = run["evaluations"]
    places = [entry["completions"] for entry in entries]
    return float(np.interp(completions, places, [entry[quantity] for entry in entries]))


def at_cost(run: Run, quantity: str, cost: float) -> float:
    """The same when the run has cost as much as `COMPLETIONS` without control, if each costs `cost` times as much."""
    return at_completions(run, quantity, COMPLETIONS / cost)


def append(path: Path, run: Run) -> None:
    """Add a line to the file; after one that was cut off, on a line of its own."""
    before = path.read_text(encoding="utf-8") if path.exists() else ""
    with path.open("a", encoding="utf-8") as file:
        file.write("\n" * (not before.endswith("\n") and bool(before)) + json.dumps(run) + "\n")


def study(path: Path, methods: list[str], minutes: float, pool: Executor, jobs: int) -> dict[str, Run]:
    """Make the runs that are missing in the file, `jobs` at a time and none after so many minutes; returns all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    start, runs = time.monotonic(), read_runs(path)
    busy: dict[Future[Run], tuple[str, Settings, int]] = {}
    while True:
        free = [one for one in missing(runs, methods) if one not in busy.values()]
        if time.monotonic() - start < 60 * minutes:
            busy |= {pool.submit(make_run, *one[1:]): one for one in free[: jobs - len(busy)]}
        if not busy:
            return runs
        for done in wait(busy, return_when=FIRST_COMPLETED).done:
            method, settings, seed = busy.pop(done)
            run = runs[key_of(settings, seed)] = done.result()
            append(path, run)
            last = run["evaluations"][-1]
            print(
                f"{method}, {settings}, seed {seed}: reward {last['reward']:.3f}, pass@1 {last['pass@1']:.3f}, "
                f"{last['seconds']:.0f} s of CPU, {(time.monotonic() - start) / 60:.0f} minutes so far",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("--results", type=Path, default=RESULTS, help="file of finished runs, which is the cache")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no run after so many minutes")
    parser.add_argument("--report", action="store_true", help="make no run: tables and figure from those that exist")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, with one thread each")
    options = parser.parse_args()
    minutes = 0 if options.report else options.minutes
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        runs = study(options.results, options.methods, minutes, pool, options.jobs)
    from control_study_tables import draw, report

    text = report(runs)
    options.results.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)
    draw(runs, FIGURE if options.results == RESULTS else options.results.with_suffix(".png"))


if __name__ == "__main__":
    main()
