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

# Settings that make another run if they change. Logging, saving, evaluation and probes leave training as it is.
# fmt: off
SETTINGS = (
    "seed", "world_size", "engine", "per_device_train_batch_size", "gradient_accumulation_steps",
    "steps_per_generation", "num_iterations", "num_generations", "max_completion_length", "temperature", "top_k",
    "top_p", "min_p", "repetition_penalty", "stop_at_answer", "use_vllm", "shuffle_dataset", "loss_type",
    "scale_rewards", "length_normalizer", "beta", "epsilon", "epsilon_high", "mask_truncated_completions",
    "learning_rate", "lr_scheduler_type", "warmup_steps", "optim", "adam_beta1", "adam_beta2", "adam_epsilon",
    "weight_decay", "max_grad_norm", "bf16", "fp16", "disable_dropout", "max_steps", "curriculum",
    "curriculum_hard_below", "curriculum_easy_above", "curriculum_hard_weight", "curriculum_normal_weight",
    "curriculum_easy_weight", "curriculum_ema", "curriculum_pass_reward",
    "resample_uninformative_groups", "max_resample_rounds",
)
# fmt: on
_CONSTANT_SCHEDULES = ("constant", "constant_with_warmup")


class CheckpointError(ValueError):
    """A checkpoint that cannot be resumed, or could not be written."""


def settings_of(args: Any) -> dict[str, Any]:
    """The values of `SETTINGS`, as JSON has them; known before any model is loaded."""
    plugin = args.deepspeed_plugin
    derived = {"engine": f"ZeRO-{plugin.zero_stage}" if plugin else "plain or DDP", "world_size": args.world_size}
    values = {name: derived[name] if name in derived else getattr(args, name, None) for name in SETTINGS}
    if values["lr_scheduler_type"] in _CONSTANT_SCHEDULES or args.additional_steps:
        del values["max_steps"]  # the length of the run changes nothing before its end, or is to change
    return json.loads(json.dumps(values, default=lambda value: getattr(value, "value", str(value))))


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


def check_before_loading(args: Any, **known: Any) -> Path | None:
    """
    The checkpoint that a run will go on from, checked as far as that needs no model and reads no large file.

    Args:
        args: `DrGRPOConfig`.
        known: settings that are planned otherwise than `args` says; None: leave it out.

    Raises:
        CheckpointError: as [`resolve`] and [`check_contract`].
    """
    path = resolve(args.resume_from_checkpoint, Path(args.output_dir), checksums=False)
    if path is not None:
        settings = settings_of(args) | known
        check_contract(path, {"settings": {name: value for name, value in settings.items() if value is not None}})
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
