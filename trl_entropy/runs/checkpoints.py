"""
Which checkpoints can be resumed: complete ones, of this run's settings. Imports no torch.

A checkpoint is complete when its seal is there, a file that is written last: sizes and checksums of all other files,
and the settings that a resumed run must share.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

SEAL = "checkpoint_complete.json"
LATEST = "latest"
_CHUNK = 2**22


class CheckpointError(ValueError):
    """A checkpoint that cannot be resumed, or could not be written."""


def seal(path: Path, contract: Mapping[str, Any]) -> None:
    """
    Mark a checkpoint as complete.

    Args:
        contract: `step`, `settings`, and what else must agree; equal values on resume.
    """
    files = {str(file.relative_to(path)): _describe(file) for file in sorted(path.rglob("*")) if file.is_file()}
    temporary = path / f".{SEAL}.tmp"
    temporary.write_text(json.dumps({**contract, "files": files}, indent=1), encoding="utf-8")
    temporary.replace(path / SEAL)


def read_seal(path: Path) -> dict[str, Any]:
    """
    The contract of a complete checkpoint, its files checked by size.

    Raises:
        CheckpointError: saying what is missing or damaged.
    """
    if not path.is_dir():
        raise CheckpointError(f"{path} is no checkpoint: there is no such folder.")
    if not (path / SEAL).exists():
        raise CheckpointError(
            f"{path} has no {SEAL}: its writing was cut off, or DrGRPOTrainer did not write it. Resume from another."
        )
    contract = json.loads((path / SEAL).read_text(encoding="utf-8"))
    for name, described in contract["files"].items():
        size = (path / name).stat().st_size if (path / name).exists() else None
        if size != described["bytes"]:
            found = "is missing" if size is None else f"has {size} bytes"
            raise CheckpointError(
                f"{path / name} {found}, it was written with {described['bytes']}. Resume from another."
            )
    return contract


def check_files(path: Path) -> None:
    """
    Compare every file with its checksum; reads them all.

    Raises:
        CheckpointError: naming the first that differs.
    """
    for name, described in read_seal(path)["files"].items():
        if _describe(path / name) != described:
            raise CheckpointError(
                f"{path / name} is damaged: its checksum is not that of the seal. Resume from another."
            )


def checkpoints_of(run: Path) -> list[Path]:
    """The checkpoint folders of a run, complete or not, newest first."""
    found = [path for path in Path(run).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(found, key=lambda path: int(path.name.split("-")[1]), reverse=True)


def newest_complete(run: Path, checksums: bool = True) -> Path | None:
    """The newest checkpoint that is whole; those passed over are named in a warning."""
    for path in checkpoints_of(run):
        try:
            check_files(path) if checksums else read_seal(path)
            return path
        except CheckpointError as error:
            logger.warning("passing over a checkpoint: %s", error)
    return None


def resolve(resume_from: str | bool | None, run: Path, checksums: bool = True) -> Path | None:
    """
    The checkpoint that `resume_from_checkpoint` means: None for a start from the beginning.

    Args:
        resume_from: `"latest"` or True: the newest complete one of `run`, or the beginning when there is none yet (a
            job that was put back into the queue early); a path; None or False: the beginning.
        checksums: read all files and compare; else their sizes only.

    Raises:
        CheckpointError: when the path is no complete, undamaged checkpoint.
    """
    if resume_from in (None, False, ""):
        return None
    if resume_from in (LATEST, True):
        path = newest_complete(run, checksums)
        if path is None:
            logger.warning("%s has no complete checkpoint: starting from the beginning", run)
        return path
    path = Path(str(resume_from))
    check_files(path) if checksums else read_seal(path)
    return path


def check_before_loading(resume_from: str | bool | None, run: Path, settings: Mapping[str, object]) -> Path | None:
    """
    The checkpoint that a run will go on from, checked as far as that needs no model and reads no large file.

    Args:
        resume_from, run: as [`resolve`].
        settings: those that a resumed run must share, and their values; only names that the checkpoint has too are
            compared.

    Raises:
        CheckpointError: as [`resolve`] and [`check_contract`].
    """
    path = resolve(resume_from, run, checksums=False)
    if path is not None:
        check_contract(path, {"settings": settings})
    return path


def check_contract(path: Path, current: Mapping[str, Any]) -> None:
    """
    Refuse a checkpoint of another run.

    Args:
        current: what this run is; only keys that are here are compared.

    Raises:
        CheckpointError: naming every value that differs.
    """
    saved = read_seal(path)
    differences = []
    for key, value in current.items():
        if key == "settings":
            old = saved.get("settings", {})
            differences += [
                f"{name} was {old[name]!r} and is {new!r}"
                for name, new in value.items()
                if name in old and old[name] != new
            ]
        elif saved.get(key) != value:
            differences.append(f"{key} was {saved.get(key)!r} and is {value!r}")
    if differences:
        advice = (
            " To train longer, use additional_steps." if any(d.startswith("max_steps") for d in differences) else ""
        )
        raise CheckpointError(
            f"{path} cannot be resumed exactly, other settings wrote it: {'; '.join(differences)}. Set them as they "
            f"were, or start a new run from its weights (model_name_or_path).{advice}"
        )


def is_finished(path: Path, max_steps: int, num_train_epochs: float) -> bool:
    """
    Whether the training that a checkpoint belongs to has made all its steps.

    Args:
        max_steps, num_train_epochs: how long the training is meant to be; the epochs count if `max_steps` is not above
            0, as in transformers.
    """
    state = json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
    if max_steps > 0:
        return state["global_step"] >= max_steps
    return state["epoch"] >= num_train_epochs - 1e-9  # a quotient of steps


def describe_finished(path: Path) -> str:
    """What to say instead of training."""
    return (
        f"{path.parent} is already finished: {path.name} is its last step. Nothing was trained, and nothing written. "
        "To train longer, set additional_steps."
    )


def fingerprint(texts: Iterable[str]) -> str:
    """A hash of texts in their order."""
    digest = hashlib.sha256()
    for text in texts:
        digest.update(f"{len(text)}:{text}".encode())
    return digest.hexdigest()[:16]


def _describe(file: Path) -> dict[str, int]:
    checksum, size = 0, 0
    with open(file, "rb") as stream:
        while chunk := stream.read(_CHUNK):
            checksum, size = zlib.crc32(chunk, checksum), size + len(chunk)
    return {"bytes": size, "crc32": checksum}
