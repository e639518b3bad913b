"""What a run wrote after the checkpoint that it resumes from is set aside, so that no step is there twice or lost."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from itertools import count
from pathlib import Path

from trl_entropy.runs.checkpoints import SEAL, checkpoints_of
from trl_entropy.runs.directory import RunDirectory
from trl_entropy.runs.durable import replace_text
from trl_entropy.runs.step_files import TABLES
from trl_entropy.runs.strict_json import Row, to_line

FOLDER = "set_aside"
_STEP = re.compile(rf"(?:step|{'|'.join(TABLES)})_(\d+)(?:_.+)?(?:\.safetensors|\.parquet)?")


def set_aside_after(run: RunDirectory, step: int) -> Path | None:
    """
    Move what is about later steps than `step` into `set_aside/after_step_000020_1/` of the run, under its own names.

    Lines of metrics and evaluations, what was measured of `step` itself when the next one began, files of probes and
    completions, evaluated checkpoints and complete checkpoints are moved, the newest checkpoints first: one that is
    still there has all its lines. A process that is killed meanwhile leaves each of them in one of the two places or,
    for lines, in both.

    Returns:
        The folder, or None if there was nothing to move.
    """
    folder = next(path for path in _names(run.path, step) if not path.exists())
    for path in _checkpoints_after(run.path, step):
        _move(path, run.path, folder)
    rows, measured_later = run.metrics(), run.metrics_added_later(step)  # which the resumed run measures again
    later = [*([measured_later] if measured_later else []), *(row for row in rows if row["step"] > step)]
    if later:
        replace_text(folder / run.metrics_path.name, "".join(to_line(row) + "\n" for row in later))
        kept = [row for row in rows if row["step"] <= step]
        run.replace_metrics([_without(row, measured_later) if row["step"] == step else row for row in kept])
    evaluated = [row for row in run.evaluation() if row["step"] > step]
    if evaluated:
        run.write_table(folder / run.evaluation_path.relative_to(run.path), evaluated)
        run.write_table(run.evaluation_path, [row for row in run.evaluation() if row["step"] <= step])
    for path in _files_after(run.path, step):
        _move(path, run.path, folder)
    return folder if folder.exists() else None


def _without(row: Row, others: Row) -> Row:
    return {name: value for name, value in row.items() if name == "step" or name not in others}


def _move(path: Path, run: Path, folder: Path) -> None:
    target = folder / path.relative_to(run)
    target.parent.mkdir(parents=True, exist_ok=True)
    os.replace(path, target)


def _names(run: Path, step: int) -> Iterator[Path]:
    return (run / FOLDER / f"after_step_{step:06d}_{number}" for number in count(1))


def _files_after(run: Path, step: int) -> Iterator[Path]:
    found = [*run.glob("evaluation/step_*"), *run.glob("probes/*/step_*"), *run.glob("completions/*")]
    for path in found:
        match = _STEP.fullmatch(path.name)
        if match and int(match[1]) > step:
            yield path


def _checkpoints_after(run: Path, step: int) -> Iterator[Path]:
    """Those with a seal, the newest first; what has none was cut off while it was written, and is written over."""
    for path in checkpoints_of(run):
        if int(path.name.split("-")[1]) > step and (path / SEAL).exists():
            yield path
