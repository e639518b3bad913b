"""One checkpoint's evaluation in a process of its own: start it, follow it, end it, say what came of it."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trl_entropy.evaluation.plan import Job

CANCELLED = "cancelled"
_TAIL = 12  # lines of a failed process's messages that are shown
_LOOK_EVERY = 0.1  # seconds
# What a launcher tells the processes of a training run; an evaluation is none of them.
_LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC_",
             "ACCELERATE_", "FSDP_")  # fmt: skip


def run_job(
    job: Job,
    timeout: float,
    show: Callable[[int, int], Any] = lambda done, total: None,
    cancel: threading.Event | None = None,
) -> str | None:
    """
    Evaluate in a process of its own, killed after `timeout` seconds or when this one is interrupted.

    Args:
        show: called with the completions done and all of them, as it goes on.
        cancel: when set, the process is killed.

    Returns:
        None, or why it failed. All that the process says goes to `evaluation/step_N.log`, which a success removes.
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
            _follow(process, show)
        finally:
            process.kill()
            process.wait()
            watcher.join()
    if cancel.is_set():
        return CANCELLED
    if process.returncode != 0 and time.monotonic() > deadline:
        return f"not done after {timeout:.0f} s; raise --timeout"
    return _outcome(process.returncode, log)


def _environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith(_LAUNCHER)}


def _end_in_time(process: subprocess.Popen[str], deadline: float, cancel: threading.Event) -> None:
    while process.poll() is None:
        if cancel.wait(_LOOK_EVERY) or time.monotonic() > deadline:
            process.kill()
            return


def _follow(process: subprocess.Popen[str], show: Callable[[int, int], Any]) -> None:
    """Read the progress that the process writes, to its end."""
    assert process.stdout is not None
    for line in process.stdout:
        match line.split():
            case ["progress", done, total]:
                show(int(done), int(total))
    process.wait()


def _outcome(returncode: int, log: Path) -> str | None:
    if returncode == 0:
        log.unlink()
        return None
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return "\n".join([f"exit status {returncode}; its last lines, all in {log}:", *lines[-_TAIL:]])


def describe(summary: dict[str, Any] | None) -> str:
    """A checkpoint's numbers in a line, with 95 % intervals over prompts."""
    assert summary is not None
    metrics = summary["metrics"]

    def shown(name: str) -> str:
        entry = metrics[name]
        interval = "" if entry["low"] is None else f" ({entry['low']:.3f}-{entry['high']:.3f})"
        return f"{entry['value']:.3f}{interval}"

    last = max((name for name in metrics if name.startswith("pass@")), key=lambda name: int(name.split("@")[1]))
    parts = [f"pass@1 {shown('pass@1')}"] + ([f"{last} {shown(last)}"] if last != "pass@1" else [])
    parts += [f"greedy {shown('greedy_accuracy')}", f"entropy {shown('entropy_mean')} nats/token"]
    return ", ".join([*parts, f"{summary['seconds']:.0f} s"])
