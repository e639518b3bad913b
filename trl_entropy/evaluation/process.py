"""Runs the evaluation of one checkpoint in a process of its own, follows its progress, and ends it in time."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

from trl_entropy.evaluation.plan import Job
from trl_entropy.evaluation.session import end_session
from trl_entropy.runs.directory import CheckpointSummary, Measured
from trl_entropy.runs.durable import discard_unfinished

CANCELLED = "cancelled"
_TAIL = 12  # lines of a failed process's messages that are shown
_LOOK_EVERY = 0.1  # seconds
# Variables that a launcher sets for the processes of a training run; the evaluation is not one of them.
_LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC_",
             "ACCELERATE_", "FSDP_")  # fmt: skip

Show = Callable[[int, int], object]


def run_job(
    job: Job,
    timeout: float,
    show: Show = lambda done, total: None,
    cancel: threading.Event | None = None,
) -> str | None:
    """
    Evaluate one checkpoint in a process of its own, in a session of its own.

    The process and all that it started are ended after `timeout` seconds, on an interrupt, and when it has ended by
    itself; its temporary files are removed. What it has generated is kept, and the next call goes on from there.

    Args:
        show: called from time to time with the number of completions that are done and the number of all.
        cancel: the process is ended when this event is set.

    Returns:
        None, or why the evaluation failed. The messages of the process are in `evaluation/step_N.log`, which is
        deleted if it succeeds.
    """
    if problem := job.target.problem():
        return problem
    log = Path(f"{job.output}.log")
    log.parent.mkdir(parents=True, exist_ok=True)
    stop = _Stop(cancel or threading.Event(), timeout)
    try:
        with open(log, "w", encoding="utf-8") as messages, _temporary_folder() as temporary:
            returncode, said = _run(job, temporary, messages, show, stop)
    finally:
        discard_unfinished(Path(job.output))
    return stop.reason or _outcome(returncode, log, said)


class _Stop:
    """
    Why a process is to be ended before it ends by itself.

    Attributes:
        reason: None until there is one.
    """

    def __init__(self, cancel: threading.Event, timeout: float) -> None:
        self.reason: str | None = None
        self._cancel, self._timeout, self._deadline = cancel, timeout, time.monotonic() + timeout

    def __call__(self) -> bool:
        """Whether there is a reason now."""
        if self._cancel.is_set():
            self.reason = CANCELLED
        elif time.monotonic() > self._deadline:
            self.reason = f"not finished after {self._timeout:.0f} s; what is generated is kept, call again to go on"
        return self.reason is not None


def _temporary_folder() -> tempfile.TemporaryDirectory[str]:
    """With a short name: sockets in it have paths of 107 characters at most."""
    return tempfile.TemporaryDirectory(prefix="trl-entropy-", ignore_cleanup_errors=True)


def _run(job: Job, temporary: str, messages: IO[str], show: Show, stop: _Stop) -> tuple[int, str]:
    """Start the process, follow it, end it with all that it started; its exit status, and why it failed."""
    command = [sys.executable, "-m", "trl_entropy.evaluation", job.to_json(), str(os.getpid()), temporary]
    process = subprocess.Popen(
        command, bufsize=0, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=messages, start_new_session=True,
        env={**_environment(), "TMPDIR": temporary},
    )  # fmt: skip
    try:
        said = _follow(process, show, stop)
    finally:
        end_session(process.pid, temporary)
        process.wait()
    return process.returncode, said


def _environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith(_LAUNCHER)}


def _follow(process: subprocess.Popen[bytes], show: Show, stop: _Stop) -> str:
    """
    Report the progress of the process until it ends, whoever else holds its output open, or is to be ended.

    Returns:
        The reason that it gives if it fails, or an empty text.
    """
    assert process.stdout is not None
    with process.stdout as output:
        os.set_blocking(output.fileno(), False)
        text, said, has_ended = b"", "", False
        while not has_ended and not stop():
            time.sleep(_LOOK_EVERY)
            has_ended = process.poll() is not None  # before the last look, so that no line is missed
            *lines, text = (text + (output.read() or b"")).split(b"\n")
            for line in lines:
                match line.decode(errors="replace").split():
                    case ["progress", done, total]:
                        show(int(done), int(total))
                    case ["failed", *reason]:
                        said = " ".join(reason)
    return said


def _outcome(returncode: int, log: Path, said: str) -> str | None:
    if returncode == 0:
        log.unlink()
        return None
    if said:
        return f"{said}; all messages are in {log}"
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return "\n".join([f"exit status {returncode}; all messages are in {log}, the last lines are:", *lines[-_TAIL:]])


def describe(summary: CheckpointSummary | None) -> str:
    """The main results of a checkpoint in one line, with 95 % intervals over prompts."""
    assert summary is not None
    metrics = summary["metrics"]
    last = max((name for name in metrics if name.startswith("pass@")), key=lambda name: int(name.split("@")[1]))
    parts = [f"{name} {_shown(metrics[name])}" for name in dict.fromkeys(["pass@1", last])]
    parts.append(f"greedy {_shown(metrics['greedy_accuracy'])}")
    parts.append(f"entropy {_shown(metrics['entropy_mean'])} nats/token")
    return ", ".join([*parts, f"{summary['seconds']:.0f} s"])


def _shown(entry: Measured) -> str:
    interval = "" if entry["low"] is None else f" ({entry['low']:.3f}-{entry['high']:.3f})"
    return f"{entry['value']:.3f}{interval}"
