"""Whether a step's change of the entropy lives in the tokens of high entropy."""

from __future__ import annotations

import math

from trl_entropy.analysis.attribution import attribution_table, own_rows
from trl_entropy.analysis.run import Run
from trl_entropy.estimators.statistics.estimate import Estimate
from trl_entropy.experiments.claims.claim import Claim, Expected, Runs, of_each_run


def measure(runs: Runs) -> dict[str, Estimate]:
    """From the attribution (T9) of every token, summed over the steps before division."""
    return of_each_run(runs["probed"], _shares)


def _shares(run: Run) -> dict[str, float]:
    tokens = own_rows(attribution_table(run, by_token=True))
    if tokens.empty:
        return {"top_fifth": math.nan}
    rank = tokens.groupby("step")["entropy"].rank(ascending=False, pct=True)
    top = tokens["attribution"][rank <= 0.2]
    whole, size = tokens["attribution"].sum(), tokens["attribution"].abs().sum()
    return {"top_fifth": float(top.sum() / whole), "of_size": float(top.abs().sum() / size)}


CLAIM = Claim(
    name="high_entropy_tokens",
    source="arXiv:2506.01939",
    statement="What a step does, its change of the entropy among it, is done by the fifth of the tokens with the "
    "highest entropy.",
    refuted_by="A share of this fifth in the gradient's part of the change (T9), summed over a run, below one half.",
    expected={
        "top_fifth": Expected(
            "share of the change by the fifth of a step's tokens with the highest entropy", above=0.5
        ),
        "of_size": Expected("their share of the sum of absolute parts"),
    },
    families=("probed",),
    measure=measure,
    caveat="The paper speaks of progress in reward; its change of the entropy is what is attributed here.",
)
