"""Whether verl's proxy of the gradient's variance follows the variance."""

from __future__ import annotations

import math

import numpy as np

from trl_entropy.analysis.run import Run
from trl_entropy.analysis.tokens import own_tokens
from trl_entropy.estimators.statistics.estimate import Estimate
from trl_entropy.experiments.claims.claim import Claim, Expected, Runs, correlation, of_each_run

_VARIANCE = "noise_scale/grad_variance_trace"


def measure(runs: Runs) -> dict[str, Estimate]:
    """Correlations over the steps of a run with tr(Sigma) of (T14), and of its thirds beside them."""
    return of_each_run(runs["probed"], _correlations)


def _correlations(run: Run) -> dict[str, float]:
    filed = set(run.probe_steps("likelihood")) & set(run.probe_steps("rollouts"))
    rows = [row for row in run.rows(_VARIANCE) if int(row["step"]) in filed]
    proxies = [proxy(run, int(row["step"])) for row in rows]
    traces = [row[_VARIANCE] for row in rows]
    found = {name: correlation([one[name] for one in proxies], traces) for name in ("proxy", "squared_advantage")}
    cut = len(rows) // 3
    late = correlation([one["proxy"] for one in proxies[cut:]], traces[cut:])
    return found | {"late": late}


def proxy(run: Run, step: int) -> dict[str, float]:
    """E[A^2 W] and E[A^2] over the completions of a step; W = sum over tokens of 1 - 2 p + sum_a p_a^2."""
    rollouts, scores = run.probe_file("rollouts", step), run.probe_file("likelihood", step)
    if "sum_squared_before" not in scores:
        return {"proxy": math.nan, "squared_advantage": math.nan}
    weights = 1.0 - 2.0 * np.exp(scores["logps_before"].astype(float)) + scores["sum_squared_before"].astype(float)
    of_rows = np.where(own_tokens(scores), weights, 0.0).sum(1)
    squares: np.ndarray = rollouts["advantages"].astype(float) ** 2
    return {"proxy": float((squares * of_rows).mean()), "squared_advantage": float(squares.mean())}


CLAIM = Claim(
    name="variance_proxy",
    source="verl, compute_variance_proxy_metrics (proxy2_total_power); its logit-gradient proxy: li26hy, PMLR 306",
    statement="E[A^2 W], with W the sum over a completion's tokens of 1 - 2 p + sum of p_a^2, follows the power of "
    "the gradient of single completions, most of which is variance, and needs no gradient.",
    refuted_by="A correlation with tr(Sigma) of (T14) over the steps of a run below 0.5.",
    expected={
        "proxy": Expected("correlation of E[A^2 W] with tr(Sigma) over the steps", above=0.5),
        "late": Expected("the same without the first third of the run"),
        "squared_advantage": Expected("correlation of E[A^2] alone"),
    },
    families=("probed",),
    measure=measure,
    caveat="tr(Sigma) is that of a prompt group's mean gradient, with noise of its own, which lowers the correlation.",
)
