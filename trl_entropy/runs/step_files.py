"""
The files that a run has for each of some steps: those of the probes, and TRL's tables of completions.

    probes/<probe>/step_000012.safetensors    completions/completions_00012.parquet

How many stay is bounded, see [`retained`]. This module does not import torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from trl_entropy.runs.durable import replacing
from trl_entropy.runs.file_errors import as_os_error
from trl_entropy.runs.reading import reading
from trl_entropy.runs.retention import retained

ROLLOUTS = "rollouts"  # the folder of the steps' own completions, which the files of probes refer to
_PROBE_FILE = re.compile(r"step_(\d+)\.safetensors")
_COMPLETIONS_FILE = re.compile(r"completions_(\d+)\.parquet")


def probe_path(run: Path, probe: str, step: int) -> Path:
    """The file that a probe writes at a step."""
    return run / "probes" / probe / f"step_{step:06d}.safetensors"


def probe_steps(run: Path, probe: str) -> list[int]:
    """The steps of which a probe has a file, in order."""
    return _steps(run / "probes" / probe, _PROBE_FILE)


def completions_path(run: Path, step: int) -> Path:
    """TRL's table of the completions that were drawn for a step."""
    return run / "completions" / f"completions_{step:05d}.parquet"


def completions_steps(run: Path) -> list[int]:
    """The steps of which there is a table of completions, in order."""
    return _steps(run / "completions", _COMPLETIONS_FILE)


def _steps(folder: Path, name: re.Pattern[str]) -> list[int]:
    matches = [name.fullmatch(path.name) for path in folder.glob("*")]
    return sorted(int(match[1]) for match in matches if match)


def write_probe_file(
    run: Path, probe: str, step: int, tensors: Mapping[str, Any], metadata: Mapping[str, object], keep: int | None
) -> Path:
    """
    Write the file of a probe, then delete those of its files, and of the steps' own completions, that need not stay.

    Args:
        tensors: torch tensors by name. This module does not import torch, hence `Any`.
        metadata: scalars, which are stored as strings; `step` is added.
        keep: of how many steps each probe has files, see [`retained`]. The step's own completions stay as long as
            any probe has a file of their step.
    """
    from safetensors.torch import save_file

    target = probe_path(run, probe, step)
    values = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    described = {name: str(value) for name, value in {"step": step, **metadata}.items()}
    with as_os_error(target), replacing(target) as temporary:
        save_file(values, temporary, described)
    if keep is not None:
        _delete_probe_files(run, probe, keep)
    return target


def _delete_probe_files(run: Path, probe: str, keep: int) -> None:
    if probe != ROLLOUTS:
        _delete(run, probe, retained(probe_steps(run, probe), keep))
    others = {folder.name for folder in (run / "probes").iterdir() if folder.is_dir()} - {ROLLOUTS}
    in_use = {step for other in others for step in probe_steps(run, other)}
    _delete(run, ROLLOUTS, in_use.union(retained(probe_steps(run, ROLLOUTS), keep)))


def _delete(run: Path, probe: str, kept: Iterable[int]) -> None:
    for step in sorted(set(probe_steps(run, probe)).difference(kept)):
        probe_path(run, probe, step).unlink()


def keep_completions(run: Path, step: int, keep: int | None) -> None:
    """
    Compress the table that TRL has just written for a step (Zstandard), then delete those that need not stay.

    Args:
        keep: of how many steps there are tables, see [`retained`].
    """
    import pyarrow.parquet as pq

    target = completions_path(run, step)
    with reading(target):
        table = pq.read_table(target)
    with as_os_error(target), replacing(target) as temporary:
        pq.write_table(table, temporary, compression="zstd")
    steps = completions_steps(run)
    for other in sorted(set(steps).difference(retained(steps, keep))):
        completions_path(run, other).unlink()
