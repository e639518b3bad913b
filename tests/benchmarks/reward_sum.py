"""
Whether the measured changes of the expected reward add up to what the run did to it, by fresh completions.

    python -m tests.benchmarks.reward_sum RUN [RUN...] [--completions 2048]

A run must have measured every step (`entropy_probe_every: 1`) and have a checkpoint of its last step. The fresh
completions are of held-out problems, the same ones before the first and after the last step, drawn with replacement.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch

from trl_entropy.analysis.run import load_run
from trl_entropy.analysis.summary import total
from trl_entropy.estimators.entropy_change.delta_entropy import RatioTerms, delta_measured
from trl_entropy.experiments.checkpoint import Checkpoint
from trl_entropy.experiments.state import Policy

ROWS, GROUP = 256, 2  # completions at a time, and of a problem


def rewards_of(checkpoint: Checkpoint, num: int, part: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rewards of `num` fresh completions, and the problem of each."""
    rewards, problems = [], []
    with tempfile.TemporaryDirectory() as folder:
        policy = Policy(checkpoint, Path(folder), held_out=True)
        for start in range(0, num, ROWS):
            chosen = policy.draw_problems(ROWS // GROUP, (0, start))  # the same at both ends
            batch = policy.draw_rollouts(chosen, GROUP, (part, start))
            rewards.append(batch["rewards"].double())
            problems.append(torch.from_numpy(chosen).repeat_interleave(GROUP))
    return torch.cat(rewards), torch.cat(problems)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--completions", type=int, default=2048)
    given = parser.parse_args()
    print("| run | steps | fresh difference | sum measured | errors apart | sum trapezoid | sum first order |")
    print("|" + "---|" * 7)
    for path in given.runs:
        last = Checkpoint.last_of(path)
        (before, problems), (after, _) = (
            rewards_of(one, given.completions, part) for part, one in ((3, last.at_start()), (4, last))
        )
        ones = torch.ones_like(before)
        fresh = delta_measured(RatioTerms(before, ones), RatioTerms(after, ones)).estimate(problems)
        run = load_run(path)
        sums = {name: total(run, f"reward/delta_{name}") for name in ("measured", "trapezoid", "linear")}
        measured = sums["measured"]
        apart = (measured.value - fresh.value) / (measured.stderr**2 + fresh.stderr**2) ** 0.5
        cells = [f"{one.value:.3f} ± {one.stderr:.3f}" for one in sums.values()]
        print(
            f"| {path.name} | {measured.num_steps} of {len(run.steps)} | {fresh.value:.3f} ± {fresh.stderr:.3f} | "
            f"{cells[0]} | {apart:+.1f} | {cells[1]} | {cells[2]} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
