"""Whether most of the gradient's noise lies within prompts."""

from __future__ import annotations

import math

from trl_entropy.analysis.run import Run
from trl_entropy.estimators.statistics.estimate import Estimate
from trl_entropy.experiments.claims.claim import Claim, Expected, Runs, of_each_run


def measure(runs: Runs) -> dict[str, Estimate]:
    """From `noise_scale/between_prompt_share`, pooled over the steps of a run."""
    return of_each_run(runs["probed"], _share)


def _share(run: Run) -> dict[str, float]:
    rows = run.rows("noise_scale/between_prompt_share")
    return {"within": 1.0 - rows[-1]["noise_scale/between_prompt_share"] if rows else math.nan}


CLAIM = Claim(
    name="within_prompt_noise",
    source="OpenReview uK4kMpNx0W",
    statement="The variance of the policy gradient comes mostly from completions of one prompt and little from which "
    "prompts were drawn, so that prompts and completions can be traded for one another at an equal total.",
    refuted_by="A share of tr(Sigma) within prompts (T14), pooled over a run of 16 prompts x 8 completions a step, "
    "below one half on runs of several seeds. The trade itself, progress at equal totals, is not measured.",
    expected={"within": Expected("share of the gradient's variance that lies within prompts", above=0.5)},
    families=("probed",),
    measure=measure,
    caveat="The share depends on how much the problems differ; these are made by one generator.",
)
