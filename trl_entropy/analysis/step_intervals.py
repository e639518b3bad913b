"""95 % intervals of what each step's probe batch says. Imports no torch."""

from __future__ import annotations

import re

import pandas as pd

from trl_entropy.estimators.statistics.student_t import student_t_quantile

_ON_THE_PROBE_BATCH = re.compile(r"(.+)/(?:(half_[ab])_|delta_|error_|probe_batch$).*")
_OTHERWISE = re.compile(r"entropy/delta_(cross_prompt|same_sample|in_sample|cov_)|fisher/|noise_scale/")


def intervals_of(steps: pd.DataFrame, key: str, num_prompts: str | None = None) -> pd.DataFrame:
    """[`Run.intervals`] of the table `Run.steps`."""
    error, found = f"{key}_stderr", _ON_THE_PROBE_BATCH.fullmatch(key)
    if key not in steps:
        raise ValueError(f"No step has {key!r}; the keys that a run has are the columns of run.steps.")
    if error not in steps:
        raise ValueError(f"{key!r} has no standard error: no step has {error!r}.")
    if num_prompts is None:
        if found is None or _OTHERWISE.match(key):
            raise ValueError(
                f"{key!r} is no number of the package's over the prompts of a probe batch, such as "
                "'entropy/delta_measured'. If it is one of your own over those prompts, pass "
                "num_prompts='entropy/num_prompts'; the page on intervals and degrees of freedom has the others."
            )
        num_prompts = f"{found[1]}/{found[2]}_num_prompts" if found[2] else "entropy/num_prompts"
    if num_prompts not in steps:
        raise ValueError(f"No step has {num_prompts!r}, which is to say over how many prompts {error!r} is.")
    table = steps[[key, error, num_prompts]].dropna(subset=[key])
    table.columns = pd.Index(["value", "stderr", "num_prompts"])
    margin = table["stderr"] * table["num_prompts"].map(lambda count: student_t_quantile(0.975, count - 1))
    ends = table.assign(low=table["value"] - margin, high=table["value"] + margin)
    return ends[["value", "stderr", "low", "high", "num_prompts"]]
