"""
The files that a run has for each of some steps: those of the probes, and tables of completions.

    probes/<probe>/step_000012.safetensors
    completions/completions_00012.parquet    what the step was trained on, as TRL writes it
    completions/evaluation_00012.parquet     what was evaluated after it, as TRL writes it
    completions/dropped_00012.parquet        groups that were drawn for it and replaced (resample_uninformative_groups)

How many stay is bounded, see [`retained`]. This module does not import torch.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

from trl_entropy.runs.durable import replacing
from trl_entropy.runs.file_errors import as_os_error
from trl_entropy.runs.reading import reading
from trl_entropy.runs.retention import retained

ROLLOUTS = "rollouts"  # the folder of the steps' own completions, which the files of probes refer to
_PROBE_FILE = re.compile(r"step_(\d+)\.safetensors")
TABLES = ("completions", "evaluation", "dropped")
_TABLE = {kind: re.compile(rf"{kind}_(\d+)(?:_.+)?\.parquet") for kind in TABLES}


def probe_path(run: Path, probe: str, step: int) -> Path:
    """The file that a probe writes at a step."""
    return run / "probes" / probe / f"step_{step:06d}.safetensors"


def probe_steps(run: Path, probe: str) -> list[int]:
    """The steps of which a probe has a file, in order."""
    return _steps(run / "probes" / probe, _PROBE_FILE)


def completions_path(run: Path, step: int, kind: str = "completions", name: str = "") -> Path:
    """The table of completions of this kind of a step; `name` is that of the evaluation set if there are several."""
    named = f"_{quote(name, safe='')}" if name else ""
    return run / "completions" / f"{kind}_{step:05d}{named}.parquet"


def completions_steps(run: Path, kind: str = "completions") -> list[int]:
    """The steps of which there is a table of completions of this kind, in order."""
    return _steps(run / "completions", _TABLE[kind])


def _steps(folder: Path, name: re.Pattern[str]) -> list[int]:
    matches = [name.fullmatch(path.name) for path in folder.glob("*")]
    return sorted({int(match[1]) for match in matches if match})


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


@contextmanager
def evaluation_apart(run: Path, step: int, name: str) -> Iterator[None]:
    """
    Inside, TRL writes the table of an evaluation where the table of the step is; it gets a name of its own, and the
    table of the step comes back.

    Args:
        name: of the evaluation set where the run has several.
    """
    path = completions_path(run, step)
    aside = path.with_name(f".{path.name}.of_the_step.tmp")
    if path.exists():
        os.replace(path, aside)
    try:
        yield
        if path.exists():
            os.replace(path, completions_path(run, step, "evaluation", name))
    finally:
        if aside.exists():
            os.replace(aside, path)


def write_dropped(run: Path, step: int, columns: Mapping[str, list], keep: int | None) -> None:
    """Write the table of the groups that were drawn for a step and not trained on; bounded as the others are."""
    import pandas as pd

    target = completions_path(run, step, "dropped")
    with as_os_error(target), replacing(target) as temporary:
        pd.DataFrame({"step": step, **columns}).to_parquet(temporary, compression="zstd")
    _delete_tables(run, "dropped", keep)


def keep_completions(run: Path, step: int, keep: int | None, kind: str = "completions", name: str = "") -> None:
    """
    Compress the table that TRL has just written for a step (Zstandard), then delete those that need not stay.

    Args:
        keep: of how many steps there are tables of this kind, see [`retained`].
        kind, name: see [`completions_path`].
    """
    import pyarrow.parquet as pq

    target = completions_path(run, step, kind, name)
    with reading(target):
        table = pq.read_table(target)
    with as_os_error(target), replacing(target) as temporary:
        pq.write_table(table, temporary, compression="zstd")
    _delete_tables(run, kind, keep)


def _delete_tables(run: Path, kind: str, keep: int | None) -> None:
    steps = completions_steps(run, kind)
    for other in sorted(set(steps).difference(retained(steps, keep))):
        for path in (run / "completions").glob(f"{kind}_{other:05d}*.parquet"):
            path.unlink()
