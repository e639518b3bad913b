"""
The entropy change of a step on the next step's completions, against that on held-out ones drawn before it.

    python tests/benchmarks/next_rollouts.py --seeds 0 1 2 --folder runs/next-rollouts

Trains the quickstart once for each seed, into FOLDER/seed-N, with the entropy probe in every step on all of the next
step's completions and, beside it, a second one on 512 held-out prompts. z is the difference of the two, divided by the
root of the sum of their squared errors: the standard normal if both are unbiased and their errors right, but for the
few prompts of a step (with 15 degrees of freedom the standard deviation is 1.07). Then run

    trl-entropy experiment agreement FOLDER/seed-0 FOLDER/seed-1 FOLDER/seed-2

for how well one half of the prompts predicts the other, by thirds of the run, and for the integrals.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from pathlib import Path
from typing import Any

from trl_entropy.probes import EntropyProbe
from trl_entropy.runs.directory import RunDirectory
from trl_entropy.train import build_trainer, parse

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
QUANTITIES = ("delta_measured", "delta_linear")


class HeldOut(EntropyProbe):
    """Keeps its numbers by step instead of logging them, and writes no files."""

    state_name = "held out"

    def __init__(self, num_prompts: int) -> None:
        super().__init__(num_prompts=num_prompts, batch_size=128, prediction="linear")
        self.rows: dict[int, dict[str, float]] = {}

    def on_before_update(self, *args: Any, metrics: dict[str, float], **kwargs: Any) -> None:
        super().on_before_update(*args, metrics={}, **kwargs)

    def on_after_update(self, *args: Any, metrics: dict[str, float], record: Any, **kwargs: Any) -> None:
        self.rows[record.step] = {}
        super().on_after_update(*args, metrics=self.rows[record.step], record=record, **kwargs)

    def _write(self, *args: Any) -> None:
        """Nothing: the files are those of the other probe."""


def train(folder: Path, seed: int, options: argparse.Namespace) -> None:
    """Train one seed, and write what the second probe has measured into its folder."""
    settings = {
        "output_dir": folder, "seed": seed, "max_steps": options.steps, "entropy_probe_every": 1,
        "entropy_probe_num_completions": 128, "evaluate_checkpoints": "none", "eval_strategy": "no",
        "eval_on_start": False,
    }  # fmt: skip
    flags = [text for name, value in settings.items() for text in (f"--{name}", str(value))]
    trainer = build_trainer(*parse(["--config", str(QUICKSTART), *flags]))
    held_out = HeldOut(options.held_out)
    trainer.add_callback(held_out)
    trainer.train()
    (folder / "held_out.json").write_text(json.dumps(held_out.rows))


def scores(folder: Path) -> dict[str, list[float]]:
    """z of each step, by quantity."""
    others = json.loads((folder / "held_out.json").read_text())
    found: dict[str, list[float]] = {name: [] for name in QUANTITIES}
    for row in RunDirectory(folder).metrics()[:-1]:  # the last step is measured on held-out prompts itself
        other = others[str(row["step"])]
        for name in QUANTITIES:
            key = f"entropy/{name}"
            error = math.hypot(row[f"{key}_stderr"], other[f"{key}_stderr"])
            if error > 0:  # the warm-up's first step has a rate of 0
                found[name].append((row[key] - other[key]) / error)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--held-out", type=int, default=512, help="completions of the second probe, one a prompt")
    parser.add_argument("--folder", type=Path, default=Path("runs/next-rollouts"))
    options = parser.parse_args()
    pooled: dict[str, list[float]] = {name: [] for name in QUANTITIES}
    for seed in options.seeds:
        folder = options.folder / f"seed-{seed}"
        if not (folder / "held_out.json").exists():
            train(folder, seed, options)
        for name, values in scores(folder).items():
            pooled[name] += values
            print(f"seed {seed}, {name}: mean of z {statistics.mean(values):+.3f}, sd {statistics.stdev(values):.3f}")
    for name, values in pooled.items():
        number, mean, sd = len(values), statistics.mean(values), statistics.stdev(values)
        half, width = 1.96 / math.sqrt(number), 1.96 * sd / math.sqrt(2 * number)
        print(
            f"{name}, {number} steps: mean of z {mean:+.3f} (95 % of a right one within {half:.3f}), sd {sd:.3f} "
            f"[{sd - width:.3f}, {sd + width:.3f}]"
        )


if __name__ == "__main__":
    main()
