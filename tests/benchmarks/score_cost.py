"""
Cost of first and second derivatives of token scores (`scores.score`, orders 1 and 2), relative to scoring alone.

    OMP_NUM_THREADS=1 python tests/benchmarks/score_cost.py [--rounds 20]

Scores 64 completions of the embedded model after its warm start; the orders take turns.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from functools import partial
from pathlib import Path

import torch
from measuring import interval, seconds
from step_time import build

from trl_entropy import DrGRPOConfig, DrGRPOTrainer
from trl_entropy.gradients.scores import score
from trl_entropy.runs.console import quiet_libraries


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args()
    quiet_libraries()
    with tempfile.TemporaryDirectory() as folder:
        trainer, _ = build(DrGRPOTrainer, DrGRPOConfig, Path(folder), steps=1)
        trainer.step_prompts.add([], 0)
        completions = trainer.probe_batches.draw(64, "held_out", step=1)
    params = {name: p.detach() for name, p in trainer.model.named_parameters()}
    generator = torch.Generator().manual_seed(0)
    direction = {name: 1e-3 * torch.randn(p.shape, generator=generator) for name, p in params.items()}
    wall: dict[int, list[float]] = {0: [], 1: [], 2: []}
    for _ in range(options.rounds + 1):
        for order, times in wall.items():
            times.append(seconds(partial(score, trainer.model, completions, 1.0, 64, params, direction, order))[1])
    for order in (1, 2):
        ratios = [slow / fast for slow, fast in zip(wall[order][1:], wall[0][1:], strict=True)]
        mean, low, high = interval(ratios)
        print(f"order {order}: {mean:.2f} times scoring, 95 % interval {low:.2f} to {high:.2f}, {len(ratios)} rounds")
    print(f"scoring alone: {1e3 * statistics.median(wall[0]):.0f} ms; {torch.get_num_threads()} thread(s)")


if __name__ == "__main__":
    main()
