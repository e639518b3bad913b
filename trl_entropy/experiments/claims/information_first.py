"""Whether mutual information sees a collapse before the entropy does."""

from __future__ import annotations

import math
from collections.abc import Sequence

from trl_entropy.analysis.run import Run
from trl_entropy.estimators.statistics.estimate import Estimate
from trl_entropy.experiments.claims.claim import Claim, Expected, Runs, correlation, over_runs

_INFORMATION, _ENTROPY = "mutual_information/lower", "entropy/policy"


def measure(runs: Runs) -> dict[str, Estimate]:
    """The lead in steps in each kind of collapse, over the runs in which the information fell by half."""
    found = {}
    for family in ("brief", "fast"):
        if given := runs.get(family):
            found[family] = over_runs([lead(run) for run in given])
            found[f"{family}_tracks"] = over_runs([tracks(run) for run in given])
    return found


def lead(run: Run) -> float:
    """
    Steps from the first at which the information was below half of its first value to the first, of those at which it
    was measured, at which the entropy was; if that never was, to the last. nan if the information never was.
    """
    rows = run.rows(_INFORMATION)
    information, entropy = (halved([row[key] for row in rows]) for key in (_INFORMATION, _ENTROPY))
    if information is None:
        return math.nan
    end = len(rows) - 1 if entropy is None else entropy
    return float(rows[end]["step"] - rows[information]["step"])


def halved(values: Sequence[float]) -> int | None:
    """The place of the first value below half of the first one."""
    return next((place for place, value in enumerate(values) if value < values[0] / 2), None)


def tracks(run: Run) -> float:
    """|correlation| of the information with the reward over the steps, less that of the entropy."""
    rows = [row for row in run.rows(_INFORMATION) if "reward" in row]
    rewards = [row["reward"] for row in rows]
    size = [abs(correlation([row[key] for row in rows], rewards)) for key in (_INFORMATION, _ENTROPY)]
    return size[0] - size[1]


CLAIM = Claim(
    name="information_first",
    source="RAGEN-2, arXiv:2604.06268",
    statement="A collapse to templates, the same answer to every prompt, shows in the mutual information of prompt "
    "and completion, while the entropy still looks sound.",
    refuted_by="No lead: information that halves (T23, lower bound) at the same step as the entropy or later, in a "
    "planted collapse, where the reward is for saying little, or in one by a learning rate that is too large.",
    expected={
        "brief": Expected("steps by which information halves before entropy, planted collapse", above=0),
        "fast": Expected("the same, learning rate too large", above=0),
        "brief_tracks": Expected("|correlation with the reward| of information less that of entropy, planted"),
        "fast_tracks": Expected("the same, learning rate too large"),
    },
    families=("brief", "fast"),
    measure=measure,
    caveat="Measured every second step. The lower bound cannot exceed the logarithm of 16 prompts, so that it falls "
    "late from values above that.",
)
