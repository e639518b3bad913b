"""
Tries the mutants of `listed.py`: puts each error into a copy of the repository, and runs the tests that must fail.

    PYTHONPATH=tests python -m mutants [--only TEXT ...]

Prints a line for each mutant, whether it was killed or survived, and a table of both by folder. Ends with exit status
1 if any survived. Each takes as long as its tests take to fail, some seconds.
"""

from __future__ import annotations

import argparse
import importlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from mutants.listed import MUTANTS, Mutant

REPOSITORY = Path(__file__).parents[2]
_OPTIONS = ("-x", "-q", "-m", "not slow and not gpu", "-p", "no:randomly", "-p", "no:cacheprovider")
_OUTPUT = ".output_of_pytest"
_DEADLINE = 900.0  # seconds; a mutant that makes its tests hang is noticed too


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="TEXT", help="number of a mutant, or part of its file"
    )
    given = parser.parse_args(arguments)
    chosen = [
        (number, mutant)
        for number, mutant in enumerate(MUTANTS)
        if not given.only or any(text == str(number) or text in mutant.file for text in given.only)
    ]
    sys.dont_write_bytecode = True  # a file that changes twice within a second would keep its compiled form
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    import_what_takes_long()
    with tempfile.TemporaryDirectory() as folder:
        copy = copied(Path(folder) / "copy")
        survivors, passing = [], set()
        for number, mutant in chosen:
            if mutant.tests not in passing and fails(copy, mutant.tests):
                sys.exit(f"Error: {mutant.tests} fails without any mutant.")
            passing.add(mutant.tests)
            start = time.perf_counter()
            killed = is_killed(copy, mutant)
            word = "killed" if killed else "SURVIVED"
            seconds = time.perf_counter() - start
            print(f"{number:3d} {word:8s} {seconds:5.1f} s  {mutant.file}  {shortened(mutant.old)}", flush=True)
            if not killed:
                survivors.append(mutant)
    print(table([mutant for _, mutant in chosen], survivors))
    return 1 if survivors else 0


def copied(folder: Path) -> Path:
    """A copy of what git knows of the repository, or would add."""
    listing = ["git", "-C", str(REPOSITORY), "ls-files", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.run(listing, check=True, capture_output=True, text=True).stdout.splitlines():
        if (REPOSITORY / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(REPOSITORY / name, folder / name)
    return folder


def is_killed(copy: Path, mutant: Mutant) -> bool:
    """Whether the mutant's tests fail with it."""
    path = copy / "trl_entropy" / mutant.file
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace(mutant.old, mutant.new), encoding="utf-8")
    try:
        return fails(copy, mutant.tests)
    finally:
        path.write_text(text, encoding="utf-8")


def fails(copy: Path, tests: str) -> bool:
    """
    Whether this test file of the copy, or this test, fails or does not end.

    It runs in a process that is forked from this one, which has imported what takes long to import, and nothing of the
    package or of its tests.
    """
    process = os.fork()
    if process == 0:
        os._exit(_run(copy, f"{copy}/tests/{tests}"))
    end = time.monotonic() + _DEADLINE
    while time.monotonic() < end:
        done, status = os.waitpid(process, os.WNOHANG)
        if done:
            code = os.waitstatus_to_exitcode(status)
            if code not in (0, 1, 2):  # 2: a test file cannot be imported
                sys.exit(f"Error: pytest ended with {code}: {(copy / _OUTPUT).read_text()[-500:]}")
            return code != 0
        time.sleep(0.05)
    os.killpg(process, signal.SIGKILL)
    os.waitpid(process, 0)
    return True


def _run(copy: Path, tests: str) -> int:
    """In the forked process: pytest's exit status."""
    import pytest

    os.setsid()
    output = os.open(copy / _OUTPUT, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(output, 1), os.dup2(output, 2)
    os.chdir(copy)
    places = [str(copy), str(copy / "tests")]
    sys.path[:] = [
        *places,
        *(path for path in sys.path if path not in ("", str(REPOSITORY), str(REPOSITORY / "tests"))),
    ]
    os.environ["PYTHONPATH"] = os.pathsep.join(places)  # for the processes that tests start
    try:
        return int(pytest.main([*_OPTIONS, tests]))
    except BaseException:
        return 1


def import_what_takes_long() -> None:
    """Of the libraries that the package and its tests use."""
    for name in ("torch", "pandas", "datasets", "peft", "trl.trainer.grpo_trainer", "hypothesis", "pytest"):
        importlib.import_module(name)
    if found := sorted(name for name in sys.modules if name.startswith("trl_entropy")):
        sys.exit(f"Error: {found[0]} is imported already, so that no mutant of it would be seen.")


def table(tried: Sequence[Mutant], survivors: Sequence[Mutant]) -> str:
    """How many mutants were tried and killed in each folder, in Markdown."""
    counts: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for mutant in tried:
        parts = mutant.file.split("/")
        of_folder = counts["/".join(parts[: 2 if parts[0] == "estimators" else 1])]
        of_folder[0] += 1
        of_folder[1] += mutant not in survivors
    lines = ["| folder | tried | killed |", "|---|---|---|"]
    lines += [f"| {folder} | {tried} | {killed} |" for folder, (tried, killed) in sorted(counts.items())]
    return "\n".join([*lines, f"| all | {len(tried)} | {len(tried) - len(survivors)} |"])


def shortened(text: str) -> str:
    return " ".join(text.split())[:60]


if __name__ == "__main__":
    sys.exit(main())
