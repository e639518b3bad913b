"""What each reward function gave to the completions of a step, from TRL's table of completions. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd

from trl_entropy.analysis.run import Run

ROUND = "resample_round"
NOT_REWARDS = ("step", "prompt", "completion", "prompt_id", "advantage", ROUND, "group", "rule")
_MATCHED = 0.5  # of the rows are found, if the table is of these completions


def reward_columns(logged: pd.DataFrame) -> pd.DataFrame:
    """The rewards of each function in TRL's table, by the name of the column on the page: `reward/FUNCTION`."""
    names = [name for name in logged if name not in NOT_REWARDS]
    return logged[names].select_dtypes("number").add_prefix("reward/")


def reward_table(run: Run, step: int, arrays: Mapping[str, np.ndarray]) -> pd.DataFrame:
    """
    The rewards of each function for the rows of a step's probe files.

    The table has the completions in the order in which they were drawn and the files in that of training, so rows are
    found by text and advantage; a row for which two rows of the table differ in a reward gets nan.

    Args:
        run: the run.
        step: the step.
        arrays: of `probes/rollouts`.

    Returns:
        A column `reward/FUNCTION` for each function, and `round` if groups may have been replaced; none if there is no
        tokenizer, or no table of these completions.
    """
    nothing = pd.DataFrame(index=range(len(arrays["rewards"])))
    if step not in run.completions_steps:
        return nothing
    logged = run.completions_of(step)
    mask: np.ndarray = arrays["completion_mask"].astype(bool)
    ids = arrays["input_ids"][:, -mask.shape[1] :]
    texts = run.completion_texts(row[kept].tolist() for row, kept in zip(ids, mask, strict=True))
    if logged is None or texts is None or "advantage" not in logged:
        return nothing
    rewards = reward_columns(logged).join(logged[[ROUND]].set_axis(["round"], axis=1) if ROUND in logged else [])
    keys = pd.MultiIndex.from_arrays([logged["completion"].map(str), logged["advantage"].astype(float).round(4)])
    known = rewards.set_index(keys)
    by_key = known.groupby(level=[0, 1])
    same = by_key.nunique(dropna=False).le(1)
    wanted = pd.MultiIndex.from_arrays([texts, arrays["advantages"].astype(float).round(4)])
    found = by_key.first().where(same).reindex(wanted).reset_index(drop=True)
    return found if wanted.isin(known.index).mean() > _MATCHED else nothing
