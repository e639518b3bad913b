"""Say which evaluated checkpoint of a run is the best, and how sure that is: `trl-entropy best RUN --by pass@1`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from trl_entropy.analysis.checkpoint_choice import Choice, best_checkpoint
from trl_entropy.runs.counted import counted
from trl_entropy.runs.file_errors import describe, ending_in_one_line


@ending_in_one_line()
def main(argv: list[str] | None = None) -> None:
    """Print the best checkpoint, and those that cannot be told from it."""
    parser = argparse.ArgumentParser(
        prog="trl-entropy best", description="Say which evaluated checkpoint is the best, and how sure that is."
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="a run directory with evaluated checkpoints")
    parser.add_argument(
        "--by",
        default="pass@1",
        help="a metric of the evaluations, or a sum of several such as 'pass@1 - 0.1*entropy_mean'; a minus before "
        "one of which less is better (default: pass@1)",
    )
    args = parser.parse_args(argv)
    try:
        choice = best_checkpoint(args.run, args.by)
    except ValueError as error:
        sys.exit(f"Error: {describe(error)}.")
    print("\n".join(describe_choice(choice)))


def describe_choice(choice: Choice) -> list[str]:
    """The choice in words, and a line for each checkpoint."""
    best = choice.table.iloc[0]
    tied = sorted(int(row.step) for row in choice.table.itertuples() if row.tied and row.step != choice.step)
    told = "every other one is worse beyond its 95 % interval"
    if tied:
        steps = ", ".join(map(str, tied))
        told = f"{counted(len(tied), 'other')} cannot be told from it (95 % intervals): step {steps}"
    lines = [
        f"step {choice.step} is the best of {len(choice.table)} by {choice.by} on "
        f"{counted(choice.num_problems, 'problem')}: {best['value']:.4f}; the probability that it is the best is "
        f"{best['probability']:.2f}; {told}",
        f"{'step':>8} {'value':>9} {'best with':>10} {'less the best':>14}   95 % interval",
    ]
    for row in choice.table.itertuples():
        interval = "" if row.step == choice.step else f"{row.difference:+14.4f}   {row.low:+.4f} to {row.high:+.4f}"
        lines.append(f"{row.step:>8} {row.value:>9.4f} {row.probability:>10.2f} {interval}")
    return lines


if __name__ == "__main__":
    main()
