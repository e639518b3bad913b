"""Several runs side by side: their steps in one table, and means over runs. Imports no torch."""

from __future__ import annotations

import os
from collections.abc import Iterable
from statistics import NormalDist

import numpy as np
import pandas as pd

from trl_entropy.analysis.run import load_run

# The 97.5 % quantile of Student's t with 1 to 10 degrees of freedom.
_STUDENT_T = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281)


def compare_runs(paths: Iterable[str | os.PathLike[str]]) -> pd.DataFrame:
    """The steps of several runs in one table; the first columns are `run` (the directory's name) and `step`."""
    runs = [load_run(path) for path in paths]
    table = pd.concat([run.steps.reset_index().assign(run=run.name) for run in runs], ignore_index=True)
    return table[["run", "step", *(name for name in table if name not in ("run", "step"))]]


def over_runs(steps: pd.DataFrame, key: str) -> pd.DataFrame:
    """
    The mean of `key` over runs at each step, with its 95 % interval (Student's t).

    Args:
        steps: from [`compare_runs`].
        key: a column of it.

    Returns:
        By step: `mean`, `low`, `high`, `num_runs`; the interval is nan at a step that only one run has reached.
    """
    table = steps.groupby("step")[key].agg(["mean", "std", "count"])
    margin = table["std"] / np.sqrt(table["count"]) * table["count"].map(lambda count: student_t(count - 1))
    ends = {"low": table["mean"] - margin, "high": table["mean"] + margin, "num_runs": table["count"]}
    return table[["mean"]].assign(**ends)


def student_t(dof: int) -> float:
    """97.5 % quantile of Student's t; nan if dof < 1; beyond 10 by Cornish-Fisher, accurate to 2e-4."""
    if dof < 1:
        return float("nan")
    if dof <= len(_STUDENT_T):
        return _STUDENT_T[dof - 1]
    z = NormalDist().inv_cdf(0.975)
    terms = (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96, (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + sum(term / dof**power for power, term in enumerate(terms, start=1))
