"""
The page and the figures of a run: `trl-entropy report RUN [RUN...]`.

Writes `RUN/report/index.html`, one file that opens without network, and the figures on it as PNG; several runs are
laid over one another on one page.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from trl_entropy.reporting.write import write_page, write_report
from trl_entropy.runs.directory import RunDirectory


def main(argv: list[str] | None = None) -> None:
    """Draw the figures and write the page of the runs named on the command line."""
    parser = argparse.ArgumentParser(
        prog="trl-entropy report", description="Draw the figures of a run, and write its page."
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run directory")
    parser.add_argument(
        "--output", type=Path, help="the page; else RUN/report/index.html, and comparison.html for several runs"
    )
    args = parser.parse_args(argv)
    try:
        for path in args.runs:
            print(write_report(path))
        name = "index.html" if len(args.runs) == 1 else "comparison.html"
        print(write_page(args.runs, args.output or RunDirectory(args.runs[0]).report_path / name))
    except ValueError as error:
        sys.exit(f"Error: {error}")


if __name__ == "__main__":
    main()
