"""
Coverage of every kind of 95 % interval that the package states, for samples of known truth: docs/intervals.md.

    python -m tests.benchmarks.interval_coverage [--repeats 2000] [--sizes 4 16 64] [--only noise]

Prints a line of the table for each interval: the share of intervals that cover the truth, at each size. A share of
2000 repeats is known to +-0.01. Shares of intervals without an end, or without a standard error, stand behind.
"""

from __future__ import annotations

import argparse
import datetime
import time

from tests.estimators.interval_cases import Case, cases, hits


def cell(case: Case, size: int, repeats: int, seed: int) -> str:
    """The share of intervals that cover, and in brackets how many are not bounded, and how many are missing."""
    covered, unbounded, missing = hits(case, size, repeats, seed)
    notes = [
        f"{count / repeats:.0%} {what}"
        for count, what in ((unbounded, "unbounded"), (missing, "missing"))
        if count >= repeats / 200
    ]
    return f"{covered / repeats:.3f}" + (f" ({', '.join(notes)})" if notes else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=2000)
    parser.add_argument("--sizes", type=int, nargs="+", default=[4, 16, 64])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="part of an interval's name")
    options = parser.parse_args()
    started = time.perf_counter()
    print(f"| interval | sample | {' | '.join(f'n = {size}' for size in options.sizes)} |")
    print("|---" * (2 + len(options.sizes)) + "|")
    for case in cases():
        if options.only in case.name:
            cells = (cell(case, size, options.repeats, options.seed) for size in options.sizes)
            print(f"| {case.name} | {case.sample} | {' | '.join(cells)} |", flush=True)
    seconds = time.perf_counter() - started
    print(f"\n{options.repeats} repeats, seed {options.seed}, {seconds:.0f} s, {datetime.date.today()}")


if __name__ == "__main__":
    main()
