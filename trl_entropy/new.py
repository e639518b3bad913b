"""Write a folder with a task that runs, to be changed into one's own: `trl-entropy new my-task`."""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from trl_entropy.runs.file_errors import ending_in_one_line

TEMPLATE = Path(__file__).parent / "tasks" / "template"
FILES = ("task.py", "config.yaml", "test_task.py")


@ending_in_one_line()
def main(argv: list[str] | None = None) -> None:
    """Write the folder that the command line names; what is there already is left alone."""
    parser = argparse.ArgumentParser(
        prog="trl-entropy new",
        description="Write a folder with a task that runs: its problems, a reward and a metric, a config, and a test.",
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="where to write it; its name is the task's")
    folder = parser.parse_args(argv).folder
    name = folder.resolve().name
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name):
        sys.exit(f"Error: {name!r} is no name for a task; use letters, digits, - and _.")
    if found := [file for file in FILES if (folder / file).exists()]:
        sys.exit(f"Error: {folder} has {', '.join(found)} already; name a folder that has not.")
    folder.mkdir(parents=True, exist_ok=True)
    for file in FILES:
        text = (TEMPLATE / file).read_text(encoding="utf-8")
        (folder / file).write_text(text.replace("NAME", name), encoding="utf-8")
        print(folder / file)
    print(f"next: cd {folder}, and trl-entropy doctor --config config.yaml")


if __name__ == "__main__":
    main()
