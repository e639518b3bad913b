"""
Which checkpoints can be resumed: complete ones, of this run's settings. Imports no torch.

A checkpoint is complete when its seal is there, a file that is written last: sizes and checksums of all other files,
and the settings that a resumed run must share.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import logging
import re
import shutil
import zlib
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from trl_entropy.runs.durable import replace_text, sync, sync_tree

logger = logging.getLogger(__name__)

SEAL = "checkpoint_complete.json"
LATEST = "latest"
LATEST_OR_NEW = "latest_or_new"
_CHUNK = 2**22
# Of the contract's settings those that a checkpoint's files depend on: no wish of the user's lets them differ.
_OF_THE_FILES = ("engine", "world_size", "optim", "optim_args")
# What may be named although it is not known before the model is loaded, or not compared under every schedule.
_NOT_ALWAYS_KNOWN = {"data", "dtype", "max_steps", "num_train_epochs"}


# What differs between a checkpoint and the run that resumes it: the former's value and the latter's, by name.
Changes = dict[str, tuple[Any, Any]]


class CheckpointError(ValueError):
    """A checkpoint that cannot be resumed, or could not be written."""


def seal(path: Path, contract: Mapping[str, Any]) -> None:
    """
    Mark a checkpoint as complete.

    Args:
        contract: `step`, `settings`, and what else must agree; equal values on resume.
    """
    files = {str(file.relative_to(path)): _describe(file) for file in sorted(path.rglob("*")) if file.is_file()}
    sync_tree(path)
    replace_text(path / SEAL, json.dumps({**contract, "files": files}, indent=1))
    sync(path.parent)


def remove(path: Path) -> None:
    """Delete a checkpoint, its seal first: what a killed process leaves of it does not look whole."""
    (path / SEAL).unlink(missing_ok=True)
    shutil.rmtree(path)


def read_seal(path: Path) -> dict[str, Any]:
    """
    The contract of a complete checkpoint, its files checked by size.

    Raises:
        CheckpointError: saying what is missing or damaged.
    """
    if not path.is_dir():
        raise CheckpointError(
            f"{path} is no checkpoint: there is no such folder. Use {LATEST}, {LATEST_OR_NEW}, or the path of a "
            "folder checkpoint-N of a run."
        )
    if not (path / SEAL).exists():
        raise CheckpointError(
            f"{path} has no {SEAL}: its writing was cut off, or DrGRPOTrainer did not write it. Resume from another."
        )
    contract = _parse_seal(path / SEAL)
    for name, described in contract["files"].items():
        size = (path / name).stat().st_size if (path / name).exists() else None
        if size != described["bytes"]:
            found = "is missing" if size is None else f"has {size} bytes"
            raise CheckpointError(
                f"{path / name} {found}, it was written with {described['bytes']}. Resume from another."
            )
    return contract


def _parse_seal(file: Path) -> dict[str, Any]:
    """What a seal says, if it is as [`seal`] wrote it: not empty, not cut, not overwritten."""
    damaged = CheckpointError(f"{file} is damaged: it is not the seal that was written there. Resume from another.")
    try:
        contract = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:  # of JSON, or of UTF-8
        raise damaged from error
    described = contract.get("files") if isinstance(contract, dict) else None
    if not described or not isinstance(described, dict) or not isinstance(contract.get("step"), int):
        raise damaged
    if not all(isinstance(one, dict) and one.keys() == {"bytes", "crc32"} for one in described.values()):
        raise damaged
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
    return sorted(found, key=step_of, reverse=True)


def step_of(checkpoint: Path) -> int:
    """The step after which a checkpoint folder was written, from its name."""
    return int(checkpoint.name.split("-")[1])


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
        resume_from: `"latest"` or True: the newest complete one of `run`, or the beginning if nothing has been logged
            yet; `"latest_or_new"`: the newest complete one, or the beginning; a path; None or False: the beginning.
        checksums: read all files and compare; else their sizes only.

    Raises:
        CheckpointError: when the path is no complete, undamaged checkpoint; when `"latest"` finds steps in the log but
            no complete checkpoint, and so would begin anew what has been trained already.
    """
    if resume_from in (None, False, ""):
        return None
    if resume_from in (LATEST, LATEST_OR_NEW, True):
        path = newest_complete(run, checksums)
        if path is None and resume_from != LATEST_OR_NEW and _has_steps(run):
            raise CheckpointError(
                f"{run} has no complete checkpoint, but metrics.jsonl holds steps. Nothing has been changed. To begin "
                f"anew there, use resume_from_checkpoint={LATEST_OR_NEW!r}: what is there is set aside in the run."
            )
        if path is None:
            logger.warning("%s has no complete checkpoint: starting from the beginning", run)
        return path
    path = Path(str(resume_from))
    check_files(path) if checksums else read_seal(path)
    return path


def _has_steps(run: Path) -> bool:
    log = Path(run) / "metrics.jsonl"
    return log.exists() and log.stat().st_size > 0


def check_before_loading(
    resume_from: str | bool | None, run: Path, settings: Mapping[str, object], allowed: Collection[str] = ()
) -> Path | None:
    """
    The checkpoint that a run will go on from, checked as far as that needs no model and reads no large file.

    Args:
        resume_from, run: as [`resolve`].
        settings, allowed: as [`check_contract`]; only names that the checkpoint has too are compared.

    Raises:
        CheckpointError: as [`resolve`] and [`check_contract`]; a name in `allowed` that cannot be is refused without a
            checkpoint too, so that a job which begins with it is not refused when it is resumed.
    """
    _check_allowed(allowed, settings)
    path = resolve(resume_from, run, checksums=False)
    if path is not None:
        check_contract(path, {"settings": settings}, allowed)
    return path


def check_contract(path: Path, current: Mapping[str, Any], allowed: Collection[str] = ()) -> Changes:
    """
    Refuse a checkpoint of another run.

    Args:
        current: what this run is; only keys that are here are compared, `settings` one by one.
        allowed: settings that may differ, by the user's wish, and `data`.

    Returns:
        What differs and is allowed: its value in the checkpoint, and that of this run.

    Raises:
        CheckpointError: naming every value that differs and is not allowed.
    """
    _check_allowed(allowed, current.get("settings", {}))
    differing = _differences(read_seal(path), current)
    refused = {name: values for name, values in differing.items() if name not in allowed}
    if refused:
        texts = [f"{name} was {old!r} and is {new!r}" for name, (old, new) in refused.items()]
        advice = " To train longer, use additional_steps." if "max_steps" in refused else ""
        free = [name for name in refused if name not in (*_OF_THE_FILES, "model", "format")]
        allow = f"allow the change (resume_allow_changes={','.join(free)}), " if len(free) == len(refused) else ""
        raise CheckpointError(
            f"{path} cannot be resumed exactly, other settings wrote it: {'; '.join(texts)}. Set them as they were, "
            f"{allow}or start a new run from its weights (model_name_or_path).{advice}"
        )
    return differing


def _check_allowed(allowed: Collection[str], settings: Mapping[str, Any]) -> None:
    may = {name for name in settings if name not in _OF_THE_FILES} | _NOT_ALWAYS_KNOWN
    wrong = [name for name in allowed if name not in may and not name.startswith("adapter")]
    if wrong:
        near = sorted({close for name in wrong for close in difflib.get_close_matches(name, may, n=2)})
        meant = f" Did you mean {' or '.join(near)}?" if near else ""
        raise CheckpointError(
            f"resume_allow_changes names {', '.join(wrong)}, which is no setting that a resumed run can change."
            f"{meant} It takes: {', '.join(sorted(may))}"
        )


def _differences(saved: Mapping[str, Any], current: Mapping[str, Any]) -> Changes:
    old, new = saved.get("settings", {}), current.get("settings", {})
    differing = {name: (old[name], value) for name, value in new.items() if name in old and old[name] != value}
    others = {name: (saved.get(name), value) for name, value in current.items() if name != "settings"}
    return differing | {name: values for name, values in others.items() if values[0] != values[1]}


def is_finished(path: Path, max_steps: int, num_train_epochs: float) -> bool:
    """
    Whether the training that a checkpoint belongs to has made all its steps.

    Args:
        max_steps, num_train_epochs: how long the training is meant to be; the epochs count if `max_steps` is not above
            0, as in transformers.
    """
    state = json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
    if max_steps > 0:
        return state.get("global_step", 0) >= max_steps
    return state.get("epoch", 0.0) >= num_train_epochs - 1e-9  # a quotient of steps


def describe_finished(path: Path, was: str = "was") -> str:
    """What to say instead of training; `was`: or will be."""
    return (
        f"{path.parent} is already finished: {path.name} is its last step. Nothing {was} trained, and nothing "
        "written. To train longer, set additional_steps."
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
