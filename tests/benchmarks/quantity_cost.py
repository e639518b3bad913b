"""
What measuring the change of the reward (T21) costs beside the entropy probe's own measurement.

    python -m tests.benchmarks.quantity_cost [--steps 10] [--completions 32] [--change-of reward]

Trains the embedded model with the quickstart's sizes; each step is measured several times on the same completions,
with and without their rewards in turns, and the fastest of each is taken, as other processes only make it slower.
Prints the sums of CPU seconds of one thread, their ratio, and the median of the steps' ratios.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from dataclasses import replace
from typing import Any

from trl_entropy import DrGRPOConfig, DrGRPOTrainer
from trl_entropy.probes.next_rollouts import NextRolloutsProbe
from trl_entropy.tasks.rewards import tag_pref
from trl_entropy.tasks.word_problems import load_word_problems

REPEATS = 5


class Twice(NextRolloutsProbe):
    """Measures each step with and without the completions' numbers."""

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self.seconds: dict[bool, list[float]] = {True: [], False: []}

    def measure(self, args: Any, past: Any, record: Any, completions: Any, *more: Any, **named: Any) -> dict:
        found, taken, first = {}, {True: [], False: []}, self._num_probed == 0
        for repeat in range(REPEATS):
            for with_values in sorted(taken, reverse=(record.step + repeat) % 2 == 0):
                self._num_probed = 0 if first else 1  # that is: the noise of rounding at the first step alone
                given = completions if with_values else replace(completions, values={})
                start = time.process_time()
                found[with_values] = super().measure(args, past, record, given, *more, **named)
                taken[with_values].append(time.process_time() - start)
        for with_values, seconds in taken.items():
            self.seconds[with_values].append(min(seconds))
        return found[True]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--completions", type=int, default=32)
    parser.add_argument("--change-of", nargs="+", default=["reward"])
    given = parser.parse_args()
    probe = Twice(1, given.completions, change_of=given.change_of)
    with tempfile.TemporaryDirectory() as folder:
        args = DrGRPOConfig(
            folder, max_steps=given.steps + 1, learning_rate=3e-4, num_prompts_per_step=16, num_generations=8,
            per_device_train_batch_size=128, max_completion_length=32, use_cpu=True, bf16=False, report_to="none",
            save_strategy="no", disable_tqdm=True, gradient_checkpointing=False, seed=0,
        )  # fmt: skip
        DrGRPOTrainer("embedded", tag_pref, args, load_word_problems(), callbacks=[probe]).train()
    pairs = list(zip(*(probe.seconds[which][1:] for which in (True, False)), strict=True))
    on, off = (sum(column) for column in zip(*pairs, strict=True))
    middle = statistics.median(a / b for a, b in pairs)
    what = ", ".join(given.change_of)
    print(f"{len(pairs)} steps, {given.completions} completions, {what}: {off:.2f} s without, {on:.2f} s with:")
    print(f"{on / off:.4f}; median of the steps' ratios {middle:.4f}")


if __name__ == "__main__":
    main()
