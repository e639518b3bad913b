"""
Write the page and the figures of a run: `trl-entropy report RUN [RUN...]`.

Writes `RUN/report/index.html`, a single file that one clicks through and that needs no network, and a figure of the
training; with `--figures` every figure of the page as PNG beside it. For several runs it also writes one page that
compares them. With `--watch` it writes nothing, and serves a page that follows the runs while they train.
"""

from __future__ import annotations

import argparse
import contextlib
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from trl_entropy.analysis.comparison import distinct
from trl_entropy.reporting.write import write_page, write_report
from trl_entropy.runs.directory import RunDirectory
from trl_entropy.runs.file_errors import check_writable, describe, ending_in_one_line, existing_parent


@ending_in_one_line()
def main(argv: list[str] | None = None) -> None:
    """Write the figures and the page of the runs named on the command line."""
    parser = argparse.ArgumentParser(
        prog="trl-entropy report", description="Write the page of a run (HTML) and its figures."
    )
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help="a run directory; several are also compared on one page"
    )
    parser.add_argument(
        "--output",
        type=Path,
        help="where to write the page (default: RUN/report/index.html; for several runs comparison.html beside it)",
    )
    parser.add_argument(
        "--figures", action="store_true", help="write the figures of the page as PNG beside it, for a paper"
    )
    parser.add_argument(
        "--watch",
        action="store_true",
        help="write nothing; serve the page on 127.0.0.1 until Ctrl-C, and add to it what the runs write meanwhile",
    )
    parser.add_argument("--port", type=int, default=0, help="of --watch (default: any that is free)")
    args = parser.parse_args(argv)
    if args.watch:
        if args.output or args.figures:
            parser.error("--watch writes no file: leave --output and --figures out")
        return _watch(args.runs, args.port)
    for run in (RunDirectory(path) for path in args.runs if path.is_dir()):
        check_writable(existing_parent(run.report_path))  # before the figures are drawn
    try:
        runs = distinct(args.runs)
        for path in runs:
            print(write_report(path, args.figures))
        folder = RunDirectory(runs[0]).report_path
        if args.output or len(runs) > 1:
            print(write_page(runs, args.output or folder / "comparison.html", args.figures))
        else:
            print(folder / "index.html")
    except ValueError as error:
        sys.exit(f"Error: {describe(error)}.")


def _watch(paths: Sequence[Path], port: int) -> None:
    """Serve the page of these runs until Ctrl-C."""
    from trl_entropy.reporting.server import PageServer

    try:
        server = PageServer(distinct(paths), port)
    except (OSError, OverflowError) as error:
        sys.exit(f"Error: --port {port} cannot be used ({describe(error)}). Choose another, or leave it out.")
    except ValueError as error:
        sys.exit(f"Error: {describe(error)}.")
    with server:
        print(f"{server.address}\nThe page follows the run until Ctrl-C. Whoever has the address can read the run.")
        there = f"{server.server_port}:127.0.0.1:{server.server_port} {socket.gethostname()}"
        print(f"From another machine: ssh -N -L {there}, then open the same address there.", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            server.serve_forever()


if __name__ == "__main__":
    main()
