"""Several runs side by side: their steps in one table, and means over runs. Imports no torch."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain, count
from pathlib import Path

import numpy as np
import pandas as pd

from trl_entropy.analysis.run import Run, load_run
from trl_entropy.estimators.statistics.student_t import student_t_quantile
from trl_entropy.runs.strict_json import Json

# Settings in which runs of one experiment may differ: their seeds, names and places.
_OF_ONE_RUN = {
    "seed", "data_seed", "output_dir", "run_name", "logging_dir", "resume_from_checkpoint", "hub_model_id",
    "hub_token", "local_rank",
}  # fmt: skip
_SEEDS = ("seed", "data_seed")
_MOST_SETTINGS, _LONGEST_VALUE = 3, 40


def compare_runs(paths: Iterable[str | os.PathLike[str]]) -> pd.DataFrame:
    """
    The steps of several runs in one table.

    Args:
        paths: run directories; one that is given twice counts once.

    Returns:
        The first columns are `run` (the directory's name), `step` and `settings`: the settings in which the runs
        differ beside seeds, names and places, as text; empty if there are none.

    Raises:
        ValueError: when two directories have the same name, or one is not there.
    """
    runs = [load_run(path) for path in distinct(paths)]
    return table_of_runs(runs, {run.name: run.config for run in runs})


def distinct(paths: Iterable[str | os.PathLike[str]]) -> list[Path]:
    """
    The directories in their order, each once however it is written.

    Raises:
        ValueError: when two of them have the same name, by which tables and legends tell runs apart.
    """
    by_place: dict[Path, Path] = {}
    for path in paths:
        by_place.setdefault(Path(path).resolve(), Path(path))
    found = list(by_place.values())
    names = [path.resolve().name for path in found]
    if len(set(names)) < len(names):
        raise ValueError(
            f"Runs are named by their directories, and these names are not all different: {names}. Rename one."
        )
    return found


def table_of_runs(runs: Sequence[Run], configs: Mapping[str, Json]) -> pd.DataFrame:
    """[`compare_runs`] of loaded runs, with the settings of each by its name; empty ones are unknown."""
    differing = differing_settings(configs)
    tables = [run.steps.reset_index().assign(run=run.name, settings=differing[run.name]) for run in runs]
    table = pd.concat(tables, ignore_index=True)
    first = ["run", "step", "settings"]
    return table[[*first, *(name for name in table if name not in first)]]


def differing_values(configs: Mapping[str, Json]) -> list[list]:
    """The settings in which runs differ, seeds among them: name, then each run's value as text, in order of runs."""
    flat = [_flat(config) | {name: config[name] for name in _SEEDS if name in config} for config in configs.values()]
    names = dict.fromkeys(name for config in flat for name in config)
    return [
        [name, *(str(config[name]) if name in config else None for config in flat)]
        for name in names
        if any(config.get(name) != flat[0].get(name) for config in flat)
    ]


def differing_settings(configs: Mapping[str, Json]) -> dict[str, str]:
    """By run: the settings in which the runs differ beside seeds, names and places, as text for a legend."""
    flat = {run: _flat(config) for run, config in configs.items()}
    known = [config for config in flat.values() if config]
    names = dict.fromkeys(name for config in known for name in config)
    differing = [name for name in names if any(config.get(name) != known[0].get(name) for config in known)]
    texts: dict[str, str] = {}
    for run, config in flat.items():
        same = [other for other in texts if _equal(flat[other], config, differing)]
        texts[run] = texts[same[0]] if same else _new_text(config, differing, set(texts.values()))
    return texts if known else dict.fromkeys(configs, "")


def _equal(first: Json, second: Json, names: Sequence[str]) -> bool:
    return bool(first) == bool(second) and all(first.get(name) == second.get(name) for name in names)


def _new_text(config: Json, names: Sequence[str], taken: set[str]) -> str:
    """The first of these settings with their values, whose beginnings are cut if they are long, unlike the others."""
    shown = [f"{name} {str(config.get(name))[-_LONGEST_VALUE:]}" for name in names[:_MOST_SETTINGS]]
    more = [f"{len(names) - len(shown)} more"] if len(names) > len(shown) else []
    text = ", ".join([*shown, *more]) if config else "settings unknown"
    candidates = chain([text], (f"{text} ({number})" for number in count(2)))
    return next(candidate for candidate in candidates if candidate not in taken)


def _flat(config: Json) -> Json:
    """The settings that are compared, those of nested tables by names with a dot."""
    found: Json = {}
    for name, value in config.items():
        inner = {f"{name}.{key}": item for key, item in value.items()} if isinstance(value, dict) else {name: value}
        found |= {} if name in _OF_ONE_RUN else inner
    if "model_name_or_path" in found:  # an embedded model lies at a place of each seed
        found.pop("model_config._name_or_path", None)
    return found


def over_runs(steps: pd.DataFrame, key: str) -> pd.DataFrame:
    """
    The mean of `key` at each step over runs that differ in their seed only, with its 95 % interval (Student's t).

    Args:
        steps: from [`compare_runs`].
        key: a column of it; without the column the result is empty.

    Returns:
        By step, or by `settings` and step if these differ: `mean`, `low`, `high`, `num_runs`; the interval is nan at
        a step that only one run has reached.
    """
    several = "settings" in steps and steps["settings"].nunique() > 1
    groups = steps.reindex(columns=["settings", "step", key]).groupby(["settings", "step"] if several else "step")
    table = groups[key].agg(["mean", "std", "count"])
    table = table[table["count"] > 0]
    margin = table["std"] / np.sqrt(table["count"]) * table["count"].map(lambda count: student_t(count - 1))
    ends = {"low": table["mean"] - margin, "high": table["mean"] + margin, "num_runs": table["count"]}
    return table[["mean"]].assign(**ends)


def student_t(dof: float) -> float:
    """97.5 % quantile of Student's t, by which a standard error is half of a 95 % interval; nan unless dof > 0."""
    return student_t_quantile(0.975, float(dof))
