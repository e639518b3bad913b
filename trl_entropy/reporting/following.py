"""Runs that are followed while they train: what the page shows of them, and what of it is new. Imports no torch."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from pathlib import Path

import pandas as pd

from trl_entropy.analysis import views
from trl_entropy.analysis.progress import progress_of
from trl_entropy.analysis.run import Run, load_run
from trl_entropy.reporting.gaps import Gaps
from trl_entropy.reporting.page_data import has_right_answers, page_data, run_data, step_data
from trl_entropy.reporting.selection import choose_step
from trl_entropy.runs.directory import RunDirectory
from trl_entropy.runs.lock import training_of
from trl_entropy.runs.step_files import ROLLOUTS, completions_path, probe_path
from trl_entropy.runs.strict_json import Json, Row

MOST_BYTES_OF_STEP = 30_000_000
_PROBES = (ROLLOUTS, "attribution", "entropy", "fisher")  # whose files are shown of a step

# What tells that a file has changed: when it was written, and its size; None: it is not there.
_Stamp = tuple[int, int] | None


class Followed:
    """
    Runs as they are now. Each reading of changed files has a number, the version; a reader that names its own gets
    the steps that have changed since, or None.

    Several threads may ask; the files are read by one at a time.

    Args:
        paths: run directories; they may have no step yet.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = list(paths)
        self._reading = threading.Lock()
        self._stamp: list[list[object]] = []
        self._version, self._reset = 0, 0
        self._runs: list[Run] = [load_run(path) for path in paths]
        self._rows: list[dict[int, Row]] = [{} for _ in paths]
        self._changed: list[dict[int, int]] = [{} for _ in paths]  # by step: the version that changed it last

    def since(self, version: int) -> Json | None:
        """
        The block `page` of the page with the steps that have changed after `version`, 0 for all of them; None if
        nothing has. `version` is that of the answer, `reset` says that it has all steps, since some were taken back,
        and `progress` of a run how far it is.
        """
        with self._reading:
            self._read()
            if version == self._version:
                return None
            reset = not 0 < self._reset <= version <= self._version
            return self._page(0 if reset else version) | {"version": self._version, "reset": reset}

    def step(self, number: int, step: int) -> Json | None:
        """What the page shows of a step of the run with this number; None if there is no such run or step."""
        with self._reading:
            if not 0 <= number < len(self._paths):
                return None
            run = load_run(self._paths[number])
            if step not in views.steps_with_completions(run):
                return None
            chosen = choose_step(run, step, MOST_BYTES_OF_STEP)
            return None if chosen is None else step_data(run, chosen)

    @property
    def names(self) -> list[str]:
        """The names of the runs."""
        return [run.name for run in self._runs]

    # ---- the steps of these

    def _read(self) -> None:
        """Read the runs if any of their files has changed, and note which steps are new or different."""
        stamp = [_stamp_of(path) for path in self._paths]
        if stamp == self._stamp:
            return
        self._stamp, self._version = stamp, self._version + 1
        self._runs = [load_run(path) for path in self._paths]
        for run, known, changed in zip(self._runs, self._rows, self._changed, strict=True):
            rows = {int(row["step"]): row for row in run.rows()}
            if not self._reset or known.keys() - rows.keys():  # a resumption has cut steps
                self._reset = self._version
            changed |= {step: self._version for step, row in rows.items() if not _same(row, known.get(step))}
            known.clear()
            known |= rows

    def _page(self, version: int) -> Json:
        gaps = Gaps()
        configs = {run.name: gaps.attempt("config.yaml", run.name, _config, run) or {} for run in self._runs}
        described = [
            self._described(number, run, configs[run.name], gaps, version) for number, run in enumerate(self._runs)
        ]
        page = page_data(self._runs, configs, gaps, described)
        return page | {"gaps": [*gaps.sentences, *(sentence for run in self._runs for sentence in run.left_out)]}

    def _described(self, number: int, run: Run, config: Json, gaps: Gaps, version: int) -> Json:
        only = {step for step in self._rows[number] if self._changed[number][step] > version}
        steps = gaps.attempt("The steps with completions", run.name, views.steps_with_completions, run) or []
        shown = {step: f"{number}-{step}-{_mark_of(run.path, step)}" for step in steps}
        binary = gaps.attempt("The rewards", run.name, _is_binary, run, steps) or False
        return run_data(run, config, gaps, shown, [], binary, only) | {"progress": str(progress_of(run))}


def _config(run: Run) -> Json:
    return run.config


def _is_binary(run: Run, steps: Sequence[int]) -> bool:
    """Whether rewards are 0 and 1, by the newest step with completions."""
    known = run.probe_steps(ROLLOUTS)
    if known:
        return has_right_answers(pd.Series(run.probe_file(ROLLOUTS, known[-1], ("rewards",))["rewards"]))
    return bool(steps) and has_right_answers(views.completions(run, steps[-1])["reward"])


def _same(row: Row, known: Row | None) -> bool:
    """Whether two rows are equal; nan is equal to itself."""
    return known is not None and (row == known or repr(row) == repr(known))


def _stamp_of(path: Path) -> list[object]:
    """What changes whenever a file changes that the page reads, or when training begins or ends."""
    run = RunDirectory(path)
    files = [run.metrics_path, run.starts_path, run.evaluation_path, path / "config.yaml", path / "environment.json"]
    folders = [path / "completions", *sorted((path / "probes").glob("*/"))]
    evaluated = sorted(run.evaluation_path.parent.glob("step_*/summary.json"))
    return [training_of(path), *((str(one), _stamped(one)) for one in (*files, *folders, *evaluated))]


def _mark_of(path: Path, step: int) -> str:
    """What changes whenever a file of a step is written."""
    files: Iterable[Path] = (completions_path(path, step), *(probe_path(path, probe, step) for probe in _PROBES))
    return f"{hash(tuple(_stamped(file) for file in files)) & 0xFFFFFFFF:x}"


def _stamped(path: Path) -> _Stamp:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size
