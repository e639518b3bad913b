"""Whether negative samples and late positions carry the fall of the entropy."""

from __future__ import annotations

import math

from trl_entropy.analysis.attribution import attribution_table, own_rows
from trl_entropy.analysis.run import Run
from trl_entropy.estimators.statistics.estimate import Estimate
from trl_entropy.experiments.claims.claim import Claim, Expected, Runs, of_each_run


def measure(runs: Runs) -> dict[str, Estimate]:
    """Shares of the attribution (T9) less shares of the tokens, summed over the steps before division."""
    return of_each_run(runs["probed"], _excess)


def _excess(run: Run) -> dict[str, float]:
    tokens = own_rows(attribution_table(run, by_token=True))
    if tokens.empty:
        return {"negative": math.nan, "late": math.nan}
    tokens = tokens[tokens["advantage"] != 0]
    chosen = {"negative": tokens["advantage"] < 0, "late": tokens["position"] >= tokens["length"] / 2}
    whole = tokens["attribution"].sum()
    return {name: float(tokens["attribution"][which].sum() / whole - which.mean()) for name, which in chosen.items()}


CLAIM = Claim(
    name="negative_samples",
    source="arXiv:2508.02260",
    statement="While the reward rises, the entropy falls by negative samples; later it is the tokens near the end of "
    "a completion whose entropy matters.",
    refuted_by="A share of the gradient's part of the change (T9), summed over a run, that is not above the share of "
    "the tokens: for completions of an advantage below 0, and for the second half of each completion.",
    expected={
        "negative": Expected(
            "share of the change by completions of an advantage below 0, less their tokens'", above=0
        ),
        "late": Expected("share of the change by the second half of each completion, less its tokens'", above=0),
    },
    families=("probed",),
    measure=measure,
    caveat="The paper's stages are not told apart; tokens of an advantage of 0 are left out.",
)
