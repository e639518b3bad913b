"""
The run directory: everything that a run leaves is written here and read here.

    runs/<name>/  config.yaml  environment.json  metrics.jsonl (one line a step)  tensorboard/  checkpoint-N/
                  starts.jsonl (one line for the beginning and each resumption)  set_aside/ (what a resumption cut)
                  completions/  probes/<probe>/step_000012.safetensors  probes/tokenizer.json  report/
                  evaluation/   metrics.csv (during training)  step_000020/ (`trl-entropy evaluate`: records.parquet,
                                prompts.parquet, positions.csv, summary.json) checkpoints.csv consolidated_metrics.csv

A write appends one whole line or moves one whole file into place, so a run killed at any moment stays readable.
`step_files.py` writes and bounds what is in `completions/` and `probes/<probe>/`.
This module imports neither torch nor transformers: a laptop without them can read a run.
"""

from __future__ import annotations

import contextlib
import csv
import enum
import functools
import json
import os
import platform
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TypedDict

from trl_entropy.runs.counted import counted
from trl_entropy.runs.durable import replace_text, replacing
from trl_entropy.runs.metrics import unit
from trl_entropy.runs.reading import UnreadableFile, read_csv_lines, read_json_lines, reading
from trl_entropy.runs.secrets import masked, masked_command, masked_items
from trl_entropy.runs.strict_json import Json, Row, to_line

_PACKAGES = ("torch", "trl", "transformers", "accelerate", "peft", "datasets", "deepspeed", "numpy", "trl_entropy")
_LATER = "added_later"  # marks a line of metrics.jsonl that belongs to an earlier one
CHECKPOINT_SUMMARY = "summary.json"  # of an evaluated checkpoint; written last, so a folder without it is incomplete
_CONSOLIDATED = ["step", "source", "metric", "value", "low", "high", "unit"]
_VARIABLES = ("ACCELERATE_", "CUDA_", "HF_HUB_", "OMP_NUM_", "TORCH_", "NCCL_", "WORLD_SIZE")


class Measured(TypedDict):
    """A number of an evaluated checkpoint with its 95 % interval; an entry that does not exist is None."""

    value: float | None
    low: float | None
    high: float | None


class CheckpointSummary(TypedDict):
    """`summary.json` of an evaluated checkpoint: which weights, under which settings, and the numbers."""

    step: int
    model: str
    fingerprint: str
    settings: Json
    device: str
    batch_size: int
    num_prompts: int
    seconds: float
    metrics: dict[str, Measured]


class RunDirectory:
    """
    Paths, writer and reader of one run.

    Args:
        path: the directory; it is created by the first write.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.metrics_path = self.path / "metrics.jsonl"
        self.starts_path = self.path / "starts.jsonl"
        self.evaluation_path = self.path / "evaluation" / "metrics.csv"
        self.tensorboard_path = self.path / "tensorboard"
        self.report_path = self.path / "report"
        self.tokenizer_path = self.path / "probes" / "tokenizer.json"
        self.unreadable_lines: dict[Path, list[int]] = {}  # of each file as it was last read, from 1

    def check_unused(self) -> None:
        """
        Refuse a directory that a run which begins anew would mix its own files into.

        Raises:
            ValueError: saying what to do.
        """
        if rows := self.metrics():
            raise ValueError(
                f"{self.path} already holds a run of {counted(rows[-1]['step'], 'step')}. Choose another "
                "output_dir, move it "
                "away, or continue it: --resume_from_checkpoint latest, in a script "
                'train(resume_from_checkpoint="latest").'
            )

    # ---- writer

    def write_config(self, config: Mapping[str, object]) -> None:
        """Write `config.yaml`: every setting of the run with the value that was used."""
        import yaml

        settings = masked(_plain(config))
        replace_text(self.path / "config.yaml", yaml.safe_dump(settings, sort_keys=True, allow_unicode=True))

    def write_environment(self, **extra: object) -> None:
        """Write `environment.json`: versions, machine, command line, commit of the code, and `extra`."""
        described = masked(_plain({**describe_environment(), **extra}))
        replace_text(self.path / "environment.json", json.dumps(described, indent=2))

    def append_start(self, step: int, checkpoint: Path | None, changed: Mapping[str, tuple[object, object]]) -> None:
        """
        Append one line to `starts.jsonl`: training begins, or goes on, after `step`.

        Args:
            checkpoint: what it resumes from; None: it starts from the beginning.
            changed: settings that differ from the checkpoint's: their values there, and their values now.
        """
        resumed = {"resumed_from": checkpoint and checkpoint.name, "changed": {n: list(v) for n, v in changed.items()}}
        self._append_line(self.starts_path, {"after_step": step, **masked_items(resumed), **describe_environment()})

    def append_metrics(self, step: int, scalars: Mapping[str, object]) -> None:
        """
        Append one line to `metrics.jsonl`; step s is the update from theta_(s-1) to theta_s.

        JSON has no nan and no infinity: they are written as null, and the entry `not_finite` of the line names them.
        """
        self._append_line(self.metrics_path, {"step": step, **scalars})

    def append_later(self, step: int, scalars: Mapping[str, object]) -> None:
        """Add numbers to a step whose line is written already: a line of their own, which readers join to it."""
        self.append_metrics(step, {_LATER: True, **scalars})

    def append_evaluation(self, step: int, scalars: Mapping[str, object], dataset: str = "") -> None:
        """
        Add a row to `evaluation/metrics.csv`; it replaces an older row of the same step and evaluation set.

        Args:
            dataset: name of the evaluation set where a run has several; a column of its own.
        """
        named = {"dataset": dataset} if dataset else {}
        others = [row for row in self.evaluation() if (row["step"], str(row.get("dataset", ""))) != (step, dataset)]
        self.write_table(self.evaluation_path, [*others, {"step": step, **named, **_plain_items(scalars)}])

    def write_checkpoint_tables(self) -> None:
        """
        Write `evaluation/checkpoints.csv`, a row for each checkpoint that `trl-entropy evaluate` has evaluated, and
        `evaluation/consolidated_metrics.csv`, a row for each number, those that training measured included.
        """
        summaries = self._readable_summaries()
        numbers = [number for row in self.evaluation() for number in _numbers_of_training(row)]
        numbers += [number for summary in summaries for number in _numbers_of_checkpoint(summary)]
        folder = self.evaluation_path.parent
        self.write_table(folder / "checkpoints.csv", [_row_of_checkpoint(summary) for summary in summaries])
        self.write_table(folder / "consolidated_metrics.csv", numbers, _CONSOLIDATED)

    def write_table(self, path: Path, rows: list[Row], columns: list[str] | None = None) -> None:
        """Write rows as CSV; `columns` are those of the rows unless they are given."""
        columns = columns or list(dict.fromkeys(name for row in rows for name in row))
        with replacing(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(rows)

    def write_tokenizer(self, text: str) -> None:
        """Write `probes/tokenizer.json`, by which readers of the probe files know the texts of their token ids."""
        replace_text(self.tokenizer_path, text)

    def replace_metrics(self, rows: list[Row]) -> None:
        """Write `metrics.jsonl` anew, one line for each row."""
        replace_text(self.metrics_path, "".join(to_line(row) + "\n" for row in rows))

    def _append_line(self, path: Path, row: Mapping[str, object]) -> None:
        """Append a line; the half line that a run leaves when it is killed while writing is ended first."""
        self.path.mkdir(parents=True, exist_ok=True)
        with open(path, "ab+") as file:
            if file.seek(0, os.SEEK_END):
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":
                    file.write(b"\n")
            file.write((to_line(_plain_items(row)) + "\n").encode())

    # ---- reader

    def metrics(self) -> list[Row]:
        """
        The lines of `metrics.jsonl` in order of step, nan and infinities restored. A line that cannot be read is left
        out, and its number stands in `unreadable_lines`: the run was killed inside it, or is writing it now. Of
        several lines of one step the last counts, joined by what was added later.
        """
        if not self.metrics_path.exists():
            return []
        lines, self.unreadable_lines[self.metrics_path] = read_json_lines(self.metrics_path)
        rows: dict[int, Row] = {}
        added: dict[int, Row] = defaultdict(dict)
        for row in lines:
            if row.pop(_LATER, False):
                added[row["step"]] |= row
            else:
                rows[row["step"]] = row
        for step, later in added.items():
            if step in rows:
                rows[step] |= later
        return [rows[step] for step in sorted(rows)]

    def metrics_added_later(self, step: int) -> Row:
        """What was added to a step after its own line had been written, as one row; empty if nothing was."""
        if not self.metrics_path.exists():
            return {}
        added: Row = {}
        for row in (row for row in read_json_lines(self.metrics_path)[0] if row["step"] == step):
            added = added | row if _LATER in row else {}
        return added

    def starts(self) -> list[Row]:
        """The lines of `starts.jsonl`: where training began and was resumed, with what was changed there."""
        if not self.starts_path.exists():
            return []
        lines, self.unreadable_lines[self.starts_path] = read_json_lines(self.starts_path, key="after_step")
        return lines

    def evaluation(self) -> list[Row]:
        """
        The rows of `evaluation/metrics.csv` in order of step, with numbers parsed. A line that is cut is left out, and
        its number stands in `unreadable_lines`.
        """
        if not self.evaluation_path.exists():
            return []
        rows, self.unreadable_lines[self.evaluation_path] = read_csv_lines(self.evaluation_path)
        return sorted(rows, key=lambda row: row["step"])

    def checkpoint_folder(self, step: int) -> Path:
        """The folder into which `trl-entropy evaluate` writes the results of the checkpoint of `step`."""
        return self.evaluation_path.parent / f"step_{step:06d}"

    def checkpoint_summary(self, step: int) -> CheckpointSummary | None:
        """Settings and metrics of an evaluated checkpoint; None if it has not been evaluated."""
        path = self.checkpoint_folder(step) / CHECKPOINT_SUMMARY
        return _summary_in(path) if path.exists() else None

    def checkpoint_summaries(self) -> list[CheckpointSummary]:
        """The summaries of all evaluated checkpoints in order of step."""
        paths = sorted(self.evaluation_path.parent.glob(f"step_*/{CHECKPOINT_SUMMARY}"))
        return [_summary_in(path) for path in paths]

    def _readable_summaries(self) -> list[CheckpointSummary]:
        """[`checkpoint_summaries`] without those that are damaged, whose checkpoints count as not evaluated."""
        summaries = []
        for path in sorted(self.evaluation_path.parent.glob(f"step_*/{CHECKPOINT_SUMMARY}")):
            with contextlib.suppress(UnreadableFile):
                summaries.append(_summary_in(path))
        return summaries


def _summary_in(path: Path) -> CheckpointSummary:
    with reading(path):
        summary: CheckpointSummary = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(summary, dict):
            raise ValueError("it holds no names with values")
        return summary


def _row_of_checkpoint(summary: CheckpointSummary) -> Row:
    """A column for each metric, with `_low` and `_high` beside it where it has an interval."""
    columns: Row = {"step": summary["step"], "num_prompts": summary["num_prompts"]}
    columns["num_samples"] = summary["settings"]["num_samples"]
    for name, entry in summary["metrics"].items():
        columns[name] = entry["value"]
        if entry["low"] is not None:
            columns |= {f"{name}_low": entry["low"], f"{name}_high": entry["high"]}
    return columns


def _numbers_of_training(row: Row) -> list[Row]:
    named = {name: value for name, value in row.items() if name not in ("step", "dataset")}
    source = f"training, {row['dataset']}" if "dataset" in row else "training"
    return [{"step": row["step"], "source": source, "metric": n, "value": v} for n, v in named.items()]


def _numbers_of_checkpoint(summary: CheckpointSummary) -> list[Row]:
    return [
        {"step": summary["step"], "source": "evaluate", "metric": name, "unit": unit(name), **entry}
        for name, entry in summary["metrics"].items()
    ]


def describe_environment() -> Json:
    """Versions, machine, command line and commit of the code: what a reader needs to repeat the run."""
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": masked_command([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "num_cpus": os.cpu_count(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "git_commit": _git_commit(),
        "environment": masked_items({k: v for k, v in sorted(os.environ.items()) if k.startswith(_VARIABLES)}),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


@functools.cache
def _git_commit() -> str | None:
    """The commit of the checkout that holds this file, with `+` if there are uncommitted changes; None elsewhere."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None

    def git(*arguments: str) -> str:
        result = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=False)
        return result.stdout.strip()

    return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain") else "")


def _plain(value: object) -> object:
    """`value` in types of JSON and YAML: scalars of numpy and torch become numbers, other objects their string."""
    if isinstance(value, Mapping):
        return _plain_items(value)
    if isinstance(value, set | frozenset):
        return [_plain(item) for item in sorted(value, key=str)]
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, enum.Enum):
        return value.value
    if value is None or isinstance(value, str | int | float | bool):
        return value
    return value.item() if hasattr(value, "item") else str(value)


def _plain_items(values: Mapping) -> dict[str, object]:
    return {str(key): _plain(item) for key, item in values.items()}
