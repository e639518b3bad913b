"""
What the entropy probe learns of the same steps for what it costs: from the next step's completions, and from held-out
ones of its own.

    OMP_NUM_THREADS=1 python tests/benchmarks/entropy_sources.py --seeds 0 1 2 --steps 20 --folder runs/entropy-sources

Trains the quickstart once for each seed with all probes in every step, which change nothing in training. Over the
steps of all seeds: the CPU milliseconds that a probe's events take in a step, drawing included; the root mean square
of the standard errors of its measured change; and R^2 of the change that one half of its prompts measures on the one
that the other half predicts (trapezoid), with the R^2 that a perfect predictor would have under the stated errors.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from trl_entropy.estimators.statistics.moments import PairMoments
from trl_entropy.probes import EntropyProbe
from trl_entropy.probes.entropy_change import EntropyChangeProbe
from trl_entropy.probes.next_rollouts import NextRolloutsProbe
from trl_entropy.train import build_trainer, parse

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.yaml"


def _timed(event: str) -> Any:
    def call(self: Any, *args: Any, metrics: dict[str, float], record: Any = None, **kwargs: Any) -> None:
        start = time.process_time()
        own: dict[str, float] = {}
        getattr(super(Timed, self), event)(*args, metrics=own, record=record, **kwargs)
        self.seconds += time.process_time() - start
        if record is not None:
            self.rows[record.step] |= own

    return call


class Timed(EntropyChangeProbe):
    """Keeps its numbers by step, and the time that they took, instead of logging them, and writes no files."""

    rows: dict[int, dict[str, float]]
    seconds: float

    on_micro_batch = _timed("on_micro_batch")
    on_before_update = _timed("on_before_update")
    on_after_update = _timed("on_after_update")
    on_rollouts_drawn = _timed("on_rollouts_drawn")
    on_no_more_rollouts = _timed("on_no_more_rollouts")

    def _write(self, *args: Any) -> None:
        """Nothing: another probe would write the same files."""


class TimedNext(Timed, NextRolloutsProbe):
    """On the next step's completions."""


class TimedHeldOut(Timed, EntropyProbe):
    """On held-out completions."""


def train(folder: Path, seed: int, options: argparse.Namespace) -> None:
    """Train one seed, and write what each probe has found into its folder."""
    probes: dict[str, Timed] = {f"next_rollouts, {n}": TimedNext(num_completions=n) for n in options.next_rollouts}
    probes |= {f"held_out, {n}": TimedHeldOut(num_prompts=n, batch_size=128) for n in options.held_out}
    settings = {
        "output_dir": folder, "seed": seed, "max_steps": options.steps, "entropy_probe": False,
        "evaluate_checkpoints": "none", "eval_strategy": "no", "eval_on_start": False, "save_strategy": "no",
    }  # fmt: skip
    flags = [text for name, value in settings.items() for text in (f"--{name}", str(value))]
    trainer = build_trainer(*parse(["--config", str(QUICKSTART), *flags]))
    for name, probe in probes.items():
        probe.state_name, probe.rows, probe.seconds = name, defaultdict(dict), 0.0
        trainer.add_callback(probe)
    trainer.train()
    found = {name: {"rows": probe.rows, "seconds": probe.seconds} for name, probe in probes.items()}
    (folder / "sources.json").write_text(json.dumps(found))


def table(folders: list[Path], steps: int) -> list[str]:
    """A line for each probe, over all steps but the last of each run, whose completions are drawn otherwise."""
    runs = [json.loads((folder / "sources.json").read_text()) for folder in folders]
    lines = ["| E | CPU ms a step | stderr, nats/token | R^2 | its ceiling | slope |", "|---|---|---|---|---|---|"]
    for name in runs[0]:
        rows = [run[name]["rows"][str(step)] for run in runs for step in range(1, steps)]
        moments = PairMoments.empty()
        for row in rows:
            pair = [row[f"entropy/{key}"] for key in ("half_a_trapezoid", "half_b_measured")]
            errors = [row[f"entropy/{key}_stderr"] for key in ("half_a_trapezoid", "half_b_measured")]
            moments = moments.update(*pair, *errors, 0.0)
        cost = 1e3 * statistics.mean(run[name]["seconds"] / steps for run in runs)
        stderr = statistics.mean(row["entropy/delta_measured_stderr"] ** 2 for row in rows) ** 0.5
        found, ceiling, slope = moments.r_squared(), moments.ceiling_r_squared(), moments.corrected_slope()
        lines.append(
            f"| {name} | {cost:.0f} | {stderr:.5f} | {found.value:.3f} +- {found.stderr:.3f} | "
            f"{ceiling.value:.3f} +- {ceiling.stderr:.3f} | {slope.value:.2f} +- {slope.stderr:.2f} |"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--next-rollouts", type=int, nargs="+", default=[32, 128], help="completions, 8 a prompt")
    parser.add_argument("--held-out", type=int, nargs="+", default=[24, 96], help="completions, one a prompt")
    parser.add_argument("--folder", type=Path, default=Path("runs/entropy-sources"))
    options = parser.parse_args()
    folders = [options.folder / f"seed-{seed}" for seed in options.seeds]
    for folder, seed in zip(folders, options.seeds, strict=True):
        if not (folder / "sources.json").exists():
            train(folder, seed, options)
    print("\n".join(table(folders, options.steps)))


if __name__ == "__main__":
    main()
