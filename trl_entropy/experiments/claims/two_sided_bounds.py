"""Whether the two ends of the baseline bound what the mean baseline does to the entropy."""

from __future__ import annotations

import math

import pandas as pd

from trl_entropy.analysis.attribution import attribution_table, own_rows
from trl_entropy.analysis.run import Run
from trl_entropy.estimators.statistics.estimate import Estimate
from trl_entropy.experiments.claims.claim import Claim, Expected, Runs, of_each_run

_HARD = 0.5  # pass rate up to which a prompt is hard: 1 - K with K the median
_MICRO = 1e-6


def measure(runs: Runs) -> dict[str, Estimate]:
    """Differences of first-order changes (T9), means over the steps of a run."""
    return of_each_run(runs["probed"], _differences)


def _differences(run: Run) -> dict[str, float]:
    tokens = own_rows(attribution_table(run, by_token=True))
    if tokens.empty:
        return {"hard": math.nan, "easy": math.nan}
    groups = slopes(tokens)
    hard, num_steps = groups["pass_rate"] <= _HARD, tokens["step"].nunique()
    of_zero = (groups["pass_rate"] * groups["slope"])[hard]  # baseline 0 less baseline p
    of_one = ((groups["pass_rate"] - 1) * groups["slope"])[~hard]  # baseline 1 less baseline p
    return {"hard": float(of_zero.sum()) / num_steps / _MICRO, "easy": float(of_one.sum()) / num_steps / _MICRO}


def slopes(tokens: pd.DataFrame) -> pd.DataFrame:
    """
    By prompt group `slope`, the sum over its completions of what each would do to the entropy with an advantage of 1:
    its attribution over its advantage, since to first order the one is proportional to the other; and `pass_rate`.
    Groups of equal rewards have no advantage and are left out.
    """
    tokens = tokens[tokens["advantage"].abs() > 1e-9]
    rows = tokens.groupby(["step", "prompt_index", "row"]).agg(
        attribution=("attribution", "sum"), advantage=("advantage", "first"), pass_rate=("pass_rate", "first")
    )
    rows["slope"] = rows["attribution"] / rows["advantage"]
    return rows.groupby(["step", "prompt_index"]).agg(slope=("slope", "sum"), pass_rate=("pass_rate", "first"))


CLAIM = Claim(
    name="two_sided_bounds",
    source="arXiv:2509.22611 (abstract; the proof could not be read)",
    statement="With a quantile of the rewards as baseline in place of their mean, a step's change of the entropy is "
    "bounded on both sides: on hard prompts, where the quantile is 0, it is below that of the mean, which curbs an "
    "explosion; on easy ones, where it is 1, above it, which prevents a collapse.",
    refuted_by="To first order the change is linear in the baseline, so that the measured step and its attribution "
    "give the change by any other one. A difference of the wrong sign, on groups of a pass rate up to one half "
    "(baseline 0 less mean) or above it (baseline 1 less mean), refutes it.",
    expected={
        "hard": Expected(
            "change with baseline 0 less that with the mean, hard prompts, 1e-6 nats/token a step", below=0
        ),
        "easy": Expected(
            "change with baseline 1 less that with the mean, easy prompts, 1e-6 nats/token a step", above=0
        ),
    },
    families=("probed",),
    measure=measure,
    caveat="The bounds' form is inferred from the abstract; K is the median here. Groups of equal rewards, which have "
    "no gradient with the mean, would have one with the other baseline and are left out.",
)
