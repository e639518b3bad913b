"""
Follow a run in the terminal: `trl-entropy watch RUN`.

Shows where training is and when it will be done, the curves of entropy, reward and measured change, the parts of the
last measured step, and warnings. Works on a run that trains, was killed, or has ended; only reads its files.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import sys
import time
from pathlib import Path

from trl_entropy.analysis.progress import progress_of
from trl_entropy.analysis.run import load_run
from trl_entropy.reporting.terminal import ASCII, LEAST_WIDTH, Look, cut, screen
from trl_entropy.runs.file_errors import describe, ending_in_one_line

_HOME, _CLEAR_BELOW, _CLEAR_LINE = "\x1b[H", "\x1b[J", "\x1b[K"


@ending_in_one_line()
def main(argv: list[str] | None = None) -> None:
    """Show the run named on the command line until it has ended, or Ctrl-C."""
    parser = argparse.ArgumentParser(
        prog="trl-entropy watch", description="Follow a run in the terminal until it has ended, or until Ctrl-C."
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="a run directory; it need not have a step yet")
    parser.add_argument("--every", type=float, default=2.0, help="seconds between two looks at its files (default: 2)")
    parser.add_argument("--once", action="store_true", help="show it once and end")
    args = parser.parse_args(argv)
    if not args.every > 0:
        parser.error(f"--every {args.every:g} is not above 0")
    try:
        with contextlib.suppress(KeyboardInterrupt):
            _follow(args.run, args.every, args.once or not sys.stdout.isatty())
    except ValueError as error:
        sys.exit(f"Error: {describe(error)}.")


def _follow(path: Path, every: float, once: bool) -> None:
    """Draw the run again and again in the same place; once only if the output is a file."""
    drawn = False
    while True:
        started, run, look = time.monotonic(), load_run(path), _look()
        lines = [cut(line, look.width) for line in screen(run, look)]
        if once:
            print("\n".join(lines))
            return
        rows = shutil.get_terminal_size().lines - 1
        text = "".join(f"{line}{_CLEAR_LINE}\n" for line in lines[:rows])
        print(("" if drawn else "\x1b[2J") + _HOME + text + _CLEAR_BELOW, end="", flush=True)
        drawn = True
        if not progress_of(run).goes_on:
            return
        time.sleep(max(every, 5 * (time.monotonic() - started)))  # a long run takes long to read


def _look() -> Look:
    """How the terminal can show it: its width, whether it has bars, and whether it has styles."""
    width = max(shutil.get_terminal_size().columns, LEAST_WIDTH)
    characters = {} if "utf" in (sys.stdout.encoding or "").lower() else ASCII
    return Look(width, styled=sys.stdout.isatty() and "NO_COLOR" not in os.environ, **characters)


if __name__ == "__main__":
    main()
