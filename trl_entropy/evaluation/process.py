"""Runs the evaluation of one checkpoint in a process of its own, follows its progress, and ends it in time."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from trl_entropy.evaluation.plan import Job
from trl_entropy.runs.directory import CheckpointSummary, Measured

CANCELLED = "cancelled"
_TAIL = 12  # lines of a failed process's messages that are shown
_LOOK_EVERY = 0.1  # seconds
# Variables that a launcher sets for the processes of a training run; the evaluation is not one of them.
_LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC_",
             "ACCELERATE_", "FSDP_")  # fmt: skip


def run_job(
    job: Job,
    timeout: float,
    show: Callable[[int, int], object] = lambda done, total: None,
    cancel: threading.Event | None = None,
) -> str | None:
    """
    Evaluate one checkpoint in a process of its own, which is killed after `timeout` seconds or on an interrupt.

    Args:
        show: called from time to time with the number of completions that are done and the number of all.
        cancel: the process is killed when this event is set.

    Returns:
        None, or why the evaluation failed. The messages of the process are in `evaluation/step_N.log`, which is
        deleted if it succeeds.
    """
    log = Path(f"{job.output}.log")
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "trl_entropy.evaluation.worker", job.to_json()]
    cancel, deadline = cancel or threading.Event(), time.monotonic() + timeout
    with open(log, "w", encoding="utf-8") as messages:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=messages, text=True, env=_environment())
        watcher = threading.Thread(target=_end_in_time, args=(process, deadline, cancel), daemon=True)
        watcher.start()
        try:
            said = _follow(process, show)
        finally:
            process.kill()
            process.wait()
            watcher.join()
    if cancel.is_set():
        return CANCELLED
    if process.returncode != 0 and time.monotonic() > deadline:
        return f"not finished after {timeout:.0f} s; raise --timeout"
    return _outcome(process.returncode, log, said)


def _environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith(_LAUNCHER)}


def _end_in_time(process: subprocess.Popen[str], deadline: float, cancel: threading.Event) -> None:
    while process.poll() is None:
        if cancel.wait(_LOOK_EVERY) or time.monotonic() > deadline:
            process.kill()
            return


def _follow(process: subprocess.Popen[str], show: Callable[[int, int], object]) -> str:
    """Report the progress of the process until it ends; returns the reason that it gives if it fails."""
    assert process.stdout is not None
    said = ""
    for line in process.stdout:
        match line.split():
            case ["progress", done, total]:
                show(int(done), int(total))
            case ["failed", *reason]:
                said = " ".join(reason)
    process.wait()
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
