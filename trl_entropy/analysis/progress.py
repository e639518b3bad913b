"""Where a training is, whether it goes on, and how long it will take, by its run directory. Imports no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import datetime
from typing import Literal

from trl_entropy.analysis.run import Run
from trl_entropy.runs.directory import RunDirectory
from trl_entropy.runs.lock import training_of
from trl_entropy.runs.reading import UnreadableFile
from trl_entropy.runs.strict_json import Row


@dataclass(frozen=True)
class Progress:
    """
    Where a training is.

    Attributes:
        state: "running"; "killed", it left its lock behind; "ended", it let go of it; "unknown", on another machine.
        step: the last step with a line in `metrics.jsonl`; 0 if there is none.
        num_steps: of the whole training; None if that is not known.
        seconds_per_step: the mean since training began or last went on, evaluations and checkpoints included.
    """

    state: Literal["running", "killed", "ended", "unknown"]
    step: int
    num_steps: int | None
    seconds_per_step: float | None

    @property
    def goes_on(self) -> bool:
        """Whether a further step may come without anyone starting the training again."""
        return self.state in ("running", "unknown") or not self.step

    @property
    def seconds_left(self) -> float | None:
        """Seconds until the last step, at the pace so far; None if unknown, or if training does not go on."""
        if self.seconds_per_step is None or self.num_steps is None or self.state not in ("running", "unknown"):
            return None
        return max(self.num_steps - self.step, 0) * self.seconds_per_step

    def __str__(self) -> str:
        """`running, step 12 of 60, 3.1 s a step, about 2 min 29 s left`."""
        if not self.step and self.state != "running":
            return "no step yet"
        of = "" if self.num_steps is None else f" of {self.num_steps}"
        place = "the first step is not done yet" if not self.step else f"step {self.step}{of}"
        words = {"unknown": "on another machine, or not known whether it runs", "running": "running"}
        parts = [f"{words[self.state]}, {place}" if self.state in words else f"{self.state} after {place}"]
        if self.seconds_per_step is not None:
            parts.append(f"{self.seconds_per_step:.3g} s a step")
        if self.seconds_left:
            parts.append(f"about {duration(self.seconds_left)} left")
        return ", ".join(parts)


def progress_of(run: Run) -> Progress:
    """The progress of a run, by its last line, its settings, its last start and its lock."""
    training, rows = training_of(run.path), run.rows()
    state: Literal["running", "killed", "ended", "unknown"] = "ended" if training == "none" else training
    step = int(rows[-1]["step"]) if rows else 0
    return Progress(state, step, _num_steps(run, rows), _seconds_per_step(run, step))


def duration(seconds: float) -> str:
    """A time in its two largest units: `2 h 5 min`, `1 min 20 s`, `8 s`."""
    whole = round(seconds)
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _num_steps(run: Run, rows: list[Row]) -> int | None:
    """`max_steps`, or what the part of all epochs that is done says."""
    try:
        config = run.config
    except UnreadableFile:
        return None
    most = config.get("max_steps")
    if isinstance(most, int) and most > 0:
        return most
    epochs, done = config.get("num_train_epochs"), rows[-1].get("epoch") if rows else None
    if not epochs or not done or not math.isfinite(done):
        return None
    return max(round(rows[-1]["step"] * epochs / done), rows[-1]["step"])


def _seconds_per_step(run: Run, step: int) -> float | None:
    """Mean seconds from the last start to the last line of `metrics.jsonl`."""
    start = run.starts[-1] if run.starts else {}
    num_steps = step - start.get("after_step", 0)
    try:
        began = datetime.strptime(start["time"], "%Y-%m-%dT%H:%M:%S%z").timestamp()
        seconds = RunDirectory(run.path).metrics_path.stat().st_mtime - began
    except (KeyError, TypeError, ValueError, OSError):
        return None
    return seconds / num_steps if num_steps > 0 and seconds > 0 else None
