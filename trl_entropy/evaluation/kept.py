"""Finished batches of an evaluation: kept on the disk, so that an evaluation that is cut off goes on from there."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from trl_entropy.runs.directory import RunDirectory
from trl_entropy.runs.durable import discard_unfinished, replace_text, replacing
from trl_entropy.runs.reading import UnreadableFile
from trl_entropy.runs.strict_json import Json, Row


class KeptBatches:
    """
    The folder `evaluation/.step_N.partial`, a file for each batch; it is removed when the evaluation is complete.

    Args:
        output: the folder that the evaluation will write.
        key: all that determines the completions: settings, weights, problems, device. What was kept under another key
            is deleted.

    Attributes:
        seconds: that the batches took which have been read here.
        batch_size: of the last batch that has been read; None before.
    """

    def __init__(self, output: Path, key: Json) -> None:
        self.seconds = 0.0
        self.batch_size: int | None = None
        self._folder = folder_of(output)
        self._key = json.dumps(key, sort_keys=True)
        self._digest = hashlib.sha256(self._key.encode()).hexdigest()
        if self._folder.exists() and self._read_key() != self._key:
            shutil.rmtree(self._folder)
        if not self._folder.exists():
            replace_text(self._folder / "key.json", self._key)

    def _read_key(self) -> str | None:
        path = self._folder / "key.json"
        return path.read_text(encoding="utf-8", errors="replace") if path.exists() else None

    def _path(self, greedy: bool, start: int) -> Path:
        return self._folder / f"{'greedy' if greedy else 'samples'}_{start:08d}.parquet"

    def read(self, greedy: bool, start: int) -> list[Row] | None:
        """The rows of the batch that begins at `start`, or None if there is no whole file of it."""
        try:
            table = pq.read_table(self._path(greedy, start))
        except (OSError, pa.ArrowInvalid):
            return None
        told = table.schema.metadata
        if told.get(b"key") != self._digest.encode():  # another evaluation has written into the folder meanwhile
            return None
        self.seconds += float(told[b"seconds"])
        self.batch_size = int(told[b"batch_size"])
        return table.to_pylist()

    def write(self, greedy: bool, start: int, rows: list[Row], batch_size: int, seconds: float) -> None:
        """
        Keep the batch that begins at `start`.

        Args:
            batch_size: which the next batch shall have.
            seconds: that this one took.
        """
        told = {"key": self._digest, "batch_size": str(batch_size), "seconds": str(seconds)}
        with replacing(self._path(greedy, start)) as temporary:
            pq.write_table(pa.Table.from_pylist(rows, metadata=told), temporary)

    def remove(self) -> None:
        """Delete all of it; the results are written. What cannot be deleted is tried once more, and then left."""
        for _ in range(2):
            if self._folder.exists():
                shutil.rmtree(self._folder, ignore_errors=True)


def folder_of(output: Path) -> Path:
    """The folder of the finished batches of the evaluation that will write `output`."""
    return output.with_name(f".{output.name}.partial")


def discard_stale(run: Path, after_step: int | None = None) -> None:
    """
    Remove what evaluations have left that no evaluation will go on from, and what was to be renamed.

    Args:
        after_step: training goes on after this step, and what is about later ones is removed too; None: it does not.
    """
    for folder in run.glob("evaluation/.step_*"):
        if match := re.fullmatch(r"\.step_(\d+)\.(partial|tmp|former\.tmp)", folder.name):
            step, output = int(match[1]), RunDirectory(run).checkpoint_folder(int(match[1]))
            if match[2] != "partial":
                discard_unfinished(output)
            elif _is_stale(run, step, folder) or (after_step is not None and step > after_step):
                shutil.rmtree(folder, ignore_errors=True)


def _is_stale(run: Path, step: int, folder: Path) -> bool:
    """Whether the checkpoint is gone, or the results are there that the batches were kept for."""
    if step and not (run / f"checkpoint-{step}").exists():
        return True
    try:
        summary = RunDirectory(run).checkpoint_summary(step)
        key = json.loads((folder / "key.json").read_text(encoding="utf-8"))
        return summary is not None and all(summary[name] == key[name] for name in ("settings", "fingerprint"))
    except (UnreadableFile, OSError, ValueError, KeyError):
        return False  # the next evaluation of this checkpoint sees to it
