"""Whether completions of different prompts lose their orthogonality late in training, as rewards stop to vary."""

from __future__ import annotations

import math

import numpy as np

from trl_entropy.analysis.run import Run, cosines_of
from trl_entropy.estimators.statistics.estimate import Estimate
from trl_entropy.experiments.claims.claim import Claim, Expected, Runs, of_each_run
from trl_entropy.experiments.output import thirds


def measure(runs: Runs) -> dict[str, Estimate]:
    """Means over the thirds of a run, and their differences."""
    return of_each_run(runs["probed"], _differences)


def _differences(run: Run) -> dict[str, float]:
    spreads = run.groups.groupby("step")["reward_std"].mean().tolist() if len(run.groups) else []
    cosines = [cosine(run, step) for step in run.probe_steps("fisher")]
    if len(spreads) < 3 or len(cosines) < 3:
        return {"spread": math.nan, "loss": math.nan, "late": math.nan}
    spread = [float(np.mean(part)) for name, part in thirds(spreads).items() if name != "all"]
    first, second, third = (float(np.mean(part)) for name, part in thirds(cosines).items() if name != "all")
    late = (third - second) - (second - first)
    return {"spread": spread[0] - spread[2], "loss": third - first, "late": late, "start": first}


def cosine(run: Run, step: int) -> float:
    """Root mean square of the cosines of two completions' scores (T12), pairs of different prompts."""
    table = cosines_of(run.kernel(step))
    prompts = table.index.get_level_values(0).to_numpy()
    pairs = table.to_numpy(dtype=float)[prompts[:, None] != prompts[None, :]]
    return float(np.sqrt(np.nanmean(pairs**2)))


CLAIM = Claim(
    name="three_phases",
    source="arXiv:2601.23135 (abstract)",
    statement="Training has three phases: an early one in which rewards of a prompt vary and prompts are orthogonal, "
    "a stable one, and a late one in which the orthogonality is lost.",
    refuted_by="Over the thirds of a run: a standard deviation of rewards within prompts that does not fall from the "
    "first to the last; a root mean square cosine between prompts that does not rise from the first to the last; or a "
    "rise that is smaller between the second and the last third than between the first and the second.",
    expected={
        "spread": Expected("standard deviation of rewards within prompts, first third less last", above=0),
        "loss": Expected("root mean square cosine between prompts, last third less first", above=0),
        "late": Expected("its rise to the last third less that to the second", above=0),
        "start": Expected("root mean square cosine between prompts, first third"),
    },
    families=("probed",),
    measure=measure,
    caveat="The paper's measure of orthogonality could not be read; here it is that of scores in AdamW's metric, over "
    "60 steps of a small task.",
)
