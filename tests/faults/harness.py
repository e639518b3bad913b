"""
Training, resumption, evaluation, archiving and reporting with a fault at the n-th operation on files: killed before it
or in its middle, a disk that is full from then on, an error at it alone. Afterwards the same command (of training:
with `latest_or_new`) must go on and end as if nothing had been, and nothing may be read as whole that is not.

    PYTHONPATH=.:tests python -m faults.harness --points 500 --seed 0 [--only evaluation report]

It starts itself anew with the library of `fail_at.c`, which gcc compiles, in LD_PRELOAD; each attempt is a fork of a
process that has imported everything.
"""

import argparse
import ctypes
import difflib
import logging
import os
import pickle
import pprint
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from faults.commands import (
    Command,
    Training,
    archive_command,
    evaluated,
    evaluation_command,
    import_everything,
    make_evaluable,
    report_command,
    reported,
    training_commands,
)

MODES = ("killed before", "killed in the middle of", "disk full from", "error at")
KINDS = ("training", "resumption", "evaluation", "archive", "report")
SECONDS = 120  # that an attempt may take


class Ended(NamedTuple):
    """How a forked attempt ended: `result` is what it returned; None if it was killed or raised."""

    result: object
    error: str
    operations: int


def library(folder: Path) -> Path:
    """The compiled library of `fail_at.c`."""
    target = folder / "fail_at.so"
    source = Path(__file__).with_name("fail_at.c")
    subprocess.run(["gcc", "-shared", "-fPIC", "-O1", "-Wall", "-o", target, source, "-ldl"], check=True)
    return target


class Fault(NamedTuple):
    """At which operation on files what happens, `mode` of `MODES`; whether a kill is of the worker's parent too."""

    at: int
    mode: int
    kills_group: bool = False


NONE = Fault(-1, 0)


def attempt(call: Callable[[], object], below: Path, fault: Fault = NONE) -> Ended:
    """Run `call` in a fork in which an operation on files below a folder fails."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        os.setpgid(0, 0)
        signal.alarm(SECONDS)
        faults = ctypes.CDLL(None)
        faults.fail_at.argtypes = [ctypes.c_char_p, ctypes.c_long, ctypes.c_int, ctypes.c_int]
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        faults.fail_at(str(below).encode(), *fault)
        result, error = None, ""
        try:
            result = call()
        except BaseException as raised:
            error = f"{type(raised).__name__}: {raised}"
        faults.disarm()
        with os.fdopen(write, "wb") as pipe:
            pipe.write(pickle.dumps((result, error, faults.operations())))
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        data = pipe.read()
    _, status = os.waitpid(child, 0)
    if not data:
        return Ended(None, f"signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else "no result", 0)
    return Ended(*pickle.loads(data))


class Outcome(NamedTuple):
    """A point: which command was tried, whether a fault ended it, and what was wrong afterwards; empty: nothing."""

    command: str
    was_ended: bool
    wrong: str


def point(command: Command, expected: object, faults: list[Fault]) -> Outcome:
    """A call for each fault, then one without."""
    with tempfile.TemporaryDirectory() as folder:
        path = _laid(command, Path(folder))
        call, was_ended = command.first, False
        for fault in faults:
            ended = attempt(partial(call, path), path, fault)
            was_ended |= bool(ended.error)
            if not ended.error and ended.result != expected:
                return Outcome(
                    command.name, was_ended, f"in spite of the fault other results:\n{_apart(ended.result, expected)}"
                )
            call = command.again
            if path.exists() and (wrong := command.wrong(path, expected)):
                return Outcome(command.name, was_ended, f"after the fault ({ended.error}): {wrong}")
        last = attempt(partial(call, path), path)
        if last.error:
            return Outcome(command.name, was_ended, f"it did not go on: {last.error}")
        other = "" if last.result == expected else f"it went on to other results:\n{_apart(last.result, expected)}"
        return Outcome(command.name, was_ended, other or command.wrong(path, expected))


def _laid(command: Command, folder: Path) -> Path:
    path = folder.resolve() / "run"
    if command.base is not None:
        shutil.copytree(command.base, path)
    return path


def _apart(found: object, expected: object) -> str:
    """The lines in which two results differ."""
    texts = [pprint.pformat(one, width=200).splitlines() for one in (expected, found)]
    return "\n".join(line for line in difflib.unified_diff(*texts, "expected", "found", lineterm="", n=0))[:3000]


def prepared(folder: Path, kinds: Sequence[str]) -> list[Command]:
    """The commands of these kinds, and the runs that they start from."""
    import_everything()
    training, base = Training(), folder / "base"
    _done(attempt(lambda: training.run(base), base))
    commands = [*training_commands(training, base), archive_command(base)]
    if "evaluation" in kinds:
        run = folder / "evaluation" / "run"
        shutil.copytree(base, run)
        make_evaluable(run)
        _done(attempt(lambda: evaluated(run, num_samples=2), run))
        commands.append(evaluation_command(run))
    if "report" in kinds:
        run = folder / "report" / "run"
        shutil.copytree(base, run)
        whole = (run / "metrics.jsonl").read_text()
        (run / "metrics.jsonl").write_text("".join(whole.splitlines(keepends=True)[:-1]))
        _done(attempt(lambda: reported(run), run))
        (run / "metrics.jsonl").write_text(whole)
        commands.append(report_command(run))
    return [command for command in commands if command.name in kinds]


def _done(ended: Ended) -> Ended:
    assert not ended.error, ended.error
    return ended


def without_fault(command: Command) -> Ended:
    """What a command leaves, and in how many operations."""
    with tempfile.TemporaryDirectory() as folder:
        path = _laid(command, Path(folder))
        return _done(attempt(partial(command.first, path), path))


def points(number: int, seed: int, kinds: Sequence[str]) -> list[Outcome]:
    """Try that many faults, spread over all operations of the kinds, and return what was wrong at each."""
    rng, outcomes = random.Random(seed), []
    with tempfile.TemporaryDirectory() as folder:
        commands = prepared(Path(folder).resolve(), kinds)
        ends = [without_fault(command) for command in commands]
        for place in range(number):
            which, mode = place % len(commands), place // len(commands) % len(MODES)
            size, num = ends[which].operations, 1 if rng.random() < 0.7 else 2
            faults = [Fault(rng.randrange(size), mode, rng.random() < 0.5) for _ in range(num)]
            outcomes.append(point(commands[which], ends[which].result, faults))
            if len(outcomes) % 20 == 0 and len(outcomes) < number:
                print(f"{len(outcomes)} of {number}", flush=True)
            if wrong := outcomes[-1].wrong:
                where = ", ".join(f"{fault.at}{' with its group' * fault.kills_group}" for fault in faults)
                print(f"{outcomes[-1].command}, {MODES[mode]} operation {where} of {size}: {wrong}", flush=True)
    return outcomes


def plant() -> None:
    """Have the archive leave every file empty that it says to have copied."""
    from trl_entropy import archive

    copy = archive._copy

    def leave_empty(source: Path, fs: object, target: str) -> object:
        digest = copy(source, fs, target)
        Path(target).write_bytes(b"")
        return digest

    archive._copy = leave_empty


def main() -> None:
    """Exit with status 1 if a fault lost something."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--points", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--planted", action="store_true", help="archive without copying, which must be found")
    parser.add_argument("--only", nargs="+", choices=KINDS, default=KINDS)
    args = parser.parse_args()
    if "fail_at" not in os.environ.get("LD_PRELOAD", ""):
        environment = os.environ | {"LD_PRELOAD": str(library(Path(tempfile.mkdtemp()))), "OMP_NUM_THREADS": "1"}
        os.execve(sys.executable, [sys.executable, "-m", "faults.harness", *sys.argv[1:]], environment)
    try:
        try_them(args)
    finally:
        shutil.rmtree(Path(os.environ["LD_PRELOAD"]).parent)


def try_them(args: argparse.Namespace) -> None:
    """Try the points and exit, with status 1 if one lost something."""
    if args.planted:
        plant()
    logging.getLogger("trl_entropy").setLevel(logging.ERROR)  # readers name what is cut
    started = time.monotonic()
    outcomes = points(args.points, args.seed, ["archive"] if args.planted else args.only)
    lost = sum(bool(outcome.wrong) for outcome in outcomes)
    tried = dict(Counter(outcome.command for outcome in outcomes))
    ended, seconds = sum(outcome.was_ended for outcome in outcomes), time.monotonic() - started
    print(
        f"{len(outcomes)} faults {tried}, of which {ended} ended the command, seed {args.seed}: {lost} lost something "
        f"({seconds:.0f} s)"
    )
    sys.exit(bool(lost))


if __name__ == "__main__":
    main()
