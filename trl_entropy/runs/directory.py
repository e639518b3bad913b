"""
The run directory: everything that a run leaves is written here and read here.

    runs/<name>/  config.yaml  environment.json  metrics.jsonl (one line a step)  tensorboard/  checkpoint-N/
                  completions/  probes/<probe>/step_000012.safetensors  report/
                  evaluation/   metrics.csv (during training)  step_000020/ (`trl-entropy evaluate`: records.parquet,
                                prompts.parquet, positions.csv, summary.json) checkpoints.csv consolidated_metrics.csv

A write appends one whole line or moves one whole file into place, so a run killed at any moment stays readable.
This module imports neither torch nor transformers: a laptop without them can read a run.
"""

from __future__ import annotations

import csv
import enum
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypedDict

from trl_entropy.runs.metrics import unit
from trl_entropy.runs.strict_json import Json, Row, from_line, to_line

_PACKAGES = ("torch", "trl", "transformers", "accelerate", "peft", "datasets", "deepspeed", "numpy", "trl_entropy")
_LATER = "added_later"  # marks a line of metrics.jsonl that belongs to an earlier one
CHECKPOINT_SUMMARY = "summary.json"  # of an evaluated checkpoint; written last, so a folder without it is incomplete
_CONSOLIDATED = ["step", "source", "metric", "value", "low", "high", "unit"]
_ENVIRONMENT_PREFIXES = ("ACCELERATE_", "CUDA_", "HF_HUB_", "OMP_NUM_", "TORCH_", "NCCL_", "WORLD_SIZE")


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
        self.evaluation_path = self.path / "evaluation" / "metrics.csv"
        self.tensorboard_path = self.path / "tensorboard"
        self.report_path = self.path / "report"

    def check_unused(self) -> None:
        """
        Refuse a directory that a run which begins anew would mix its own files into.

        Raises:
            ValueError: saying what to do.
        """
        if rows := self.metrics():
            raise ValueError(
                f"{self.path} already holds a run of {rows[-1]['step']} step(s). Choose another output_dir, move it "
                "away, or continue it: --resume_from_checkpoint latest, in a script "
                'train(resume_from_checkpoint="latest").'
            )

    # ---- writer

    def write_config(self, config: Mapping[str, object]) -> None:
        """Write `config.yaml`: every setting of the run with the value that was used."""
        import yaml

        self._replace("config.yaml", yaml.safe_dump(_plain(config), sort_keys=True, allow_unicode=True))

    def write_environment(self, **extra: object) -> None:
        """Write `environment.json`: versions, machine, command line, commit of the code, and `extra`."""
        self._replace("environment.json", json.dumps(_plain({**describe_environment(), **extra}), indent=2))

    def append_metrics(self, step: int, scalars: Mapping[str, object]) -> None:
        """
        Append one line to `metrics.jsonl`; step s is the update from theta_(s-1) to theta_s.

        JSON has no nan and no infinity: they are written as null, and the entry `not_finite` of the line names them.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        self._end_last_line()
        with open(self.metrics_path, "a", encoding="utf-8") as file:
            file.write(to_line({"step": step, **_plain_items(scalars)}) + "\n")

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
        self._write_evaluation([*others, {"step": step, **named, **_plain_items(scalars)}])

    def _write_evaluation(self, rows: list[Row]) -> None:
        self._write_csv(self.evaluation_path, rows)

    def write_checkpoint_tables(self) -> None:
        """
        Write `evaluation/checkpoints.csv`, a row for each checkpoint that `trl-entropy evaluate` has evaluated, and
        `evaluation/consolidated_metrics.csv`, a row for each number, those that training measured included.
        """
        summaries = self.checkpoint_summaries()
        numbers = [number for row in self.evaluation() for number in _numbers_of_training(row)]
        numbers += [number for summary in summaries for number in _numbers_of_checkpoint(summary)]
        folder = self.evaluation_path.parent
        self._write_csv(folder / "checkpoints.csv", [_row_of_checkpoint(summary) for summary in summaries])
        self._write_csv(folder / "consolidated_metrics.csv", numbers, _CONSOLIDATED)

    def _write_csv(self, path: Path, rows: list[Row], columns: list[str] | None = None) -> None:
        columns = columns or list(dict.fromkeys(name for row in rows for name in row))
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        with open(temporary, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(rows)
        temporary.replace(path)

    def write_probe_file(
        self, probe: str, step: int, tensors: Mapping[str, Any], metadata: Mapping[str, object], keep: int | None
    ) -> Path:
        """
        Write `probes/<probe>/step_000012.safetensors`, then delete all but the newest `keep` files of this probe.

        Args:
            tensors: torch tensors by name. This module does not import torch, hence `Any`.
            metadata: scalars, which are stored as strings; `step` is added.
            keep: None keeps all files.
        """
        from safetensors.torch import save_file

        folder = self.path / "probes" / probe
        folder.mkdir(parents=True, exist_ok=True)
        target, temporary = folder / f"step_{step:06d}.safetensors", folder / f".step_{step:06d}.tmp"
        values = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        save_file(values, temporary, {name: str(value) for name, value in {"step": step, **metadata}.items()})
        temporary.replace(target)
        if keep is not None:
            for old in sorted(folder.glob("step_*.safetensors"))[:-keep]:
                old.unlink()
        return target

    def cut_after(self, step: int) -> None:
        """Delete what was written about steps after `step`, from which a run resumes: no step is logged twice."""
        if self.metrics_path.exists():
            lines = [to_line(row) + "\n" for row in self.metrics() if row["step"] <= step]
            self._replace(self.metrics_path.name, "".join(lines))
        if self.evaluation_path.exists():
            self._write_evaluation([row for row in self.evaluation() if row["step"] <= step])
        for folder in self.path.glob("evaluation/step_*"):
            if int(folder.name.rsplit("_", 1)[1]) > step:
                shutil.rmtree(folder)
        for file in [*self.path.glob("probes/*/step_*.safetensors"), *self.path.glob("completions/*.parquet")]:
            if int(file.stem.rsplit("_", 1)[1]) > step:
                file.unlink()

    def _end_last_line(self) -> None:
        """End the half line that a run leaves when it is killed while writing, so that the next line is readable."""
        if not self.metrics_path.exists() or self.metrics_path.stat().st_size == 0:
            return
        with open(self.metrics_path, "rb+") as file:
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")

    def _replace(self, name: str, text: str) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        temporary = self.path / f".{name}.tmp"
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(self.path / name)

    # ---- reader

    def metrics(self) -> list[Row]:
        """
        The lines of `metrics.jsonl` in order of step, nan and infinities restored. An incomplete line is skipped; of
        several lines of one step the last counts, joined by what was added later.
        """
        if not self.metrics_path.exists():
            return []
        rows: dict[int, Row] = {}
        added: dict[int, Row] = defaultdict(dict)
        for line in self.metrics_path.read_text(encoding="utf-8").splitlines():
            try:
                row = from_line(line)
            except json.JSONDecodeError:
                continue  # the run was killed inside this line, or is writing it now
            if row.pop(_LATER, False):
                added[row["step"]] |= row
            else:
                rows[row["step"]] = row
        return [rows[step] | added.get(step, {}) for step in sorted(rows)]

    def evaluation(self) -> list[Row]:
        """The rows of `evaluation/metrics.csv` in order of step, with numbers parsed."""
        if not self.evaluation_path.exists():
            return []
        with open(self.evaluation_path, newline="", encoding="utf-8") as file:
            rows = [{name: _number(text) for name, text in row.items() if text != ""} for row in csv.DictReader(file)]
        return sorted(rows, key=lambda row: row["step"])

    def checkpoint_folder(self, step: int) -> Path:
        """The folder into which `trl-entropy evaluate` writes the results of the checkpoint of `step`."""
        return self.evaluation_path.parent / f"step_{step:06d}"

    def checkpoint_summary(self, step: int) -> CheckpointSummary | None:
        """Settings and metrics of an evaluated checkpoint; None if it has not been evaluated."""
        path = self.checkpoint_folder(step) / CHECKPOINT_SUMMARY
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None

    def checkpoint_summaries(self) -> list[CheckpointSummary]:
        """The summaries of all evaluated checkpoints in order of step."""
        paths = sorted(self.evaluation_path.parent.glob(f"step_*/{CHECKPOINT_SUMMARY}"))
        return [json.loads(path.read_text(encoding="utf-8")) for path in paths]


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
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "python": platform.python_version(),
        "platform": platform.platform(),
        "num_cpus": os.cpu_count(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "git_commit": _git_commit(),
        "environment": {k: v for k, v in sorted(os.environ.items()) if k.startswith(_ENVIRONMENT_PREFIXES)},
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


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
    if isinstance(value, list | tuple | set):
        return [_plain(item) for item in value]
    if isinstance(value, enum.Enum):
        return value.value
    if value is None or isinstance(value, str | int | float | bool):
        return value
    return value.item() if hasattr(value, "item") else str(value)


def _plain_items(values: Mapping) -> dict[str, object]:
    return {str(key): _plain(item) for key, item in values.items()}


def _number(text: str) -> float | str:
    """`text` as an int, else as a float, else as it is."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
