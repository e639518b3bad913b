"""Whether the sign of S - E[S] tells the direction of a step."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from trl_entropy.analysis.run import Run
from trl_entropy.estimators.entropy_change.published import published_predictions
from trl_entropy.estimators.statistics.estimate import Estimate
from trl_entropy.experiments.claims.claim import Claim, Expected, Runs

_MEASURED = "entropy/delta_measured"
_FEWEST = 5


def measure(runs: Runs) -> dict[str, Estimate]:
    """Over the steps of all runs whose measured change is more than two standard errors from 0."""
    pairs = [pair for run in runs["probed"] for pair in resolved(run)]
    told = {sign: [predicted * sign > 0 for predicted, change in pairs if change * sign > 0] for sign in (1, -1)}
    found = {name: _accuracy(told[sign]) for name, sign in (("rising", 1), ("falling", -1))}
    both = list(found.values())
    stderr = math.hypot(*(one.stderr for one in both)) / 2
    dof = min(one.dof for one in both)
    found["balanced"] = Estimate(sum(one.value for one in both) / 2, stderr, dof, len(pairs))
    return found


def resolved(run: Run) -> Iterator[tuple[float, float]]:
    """Of each such step the prediction, nats times advantage, and the measured change, nats per token."""
    filed = set(run.probe_steps("likelihood")) & set(run.probe_steps("rollouts"))
    for row in run.rows(_MEASURED):
        if int(row["step"]) not in filed or abs(row[_MEASURED]) <= 2 * row[f"{_MEASURED}_stderr"]:
            continue
        scores = run.probe_file("likelihood", int(row["step"]))
        if "mean_discriminator_before" not in scores:
            continue
        advantages = run.probe_file("rollouts", int(row["step"]), ["advantages"])["advantages"]
        names = ("logps_before", "entropy_before", "mean_discriminator_before")
        logps, entropy, means = (torch.from_numpy(scores[name]) for name in names)
        mask = torch.from_numpy(scores.get("loss_mask", scores["completion_mask"]))
        found = published_predictions(logps, entropy, torch.from_numpy(advantages), mask, means)
        yield found["discriminator_exact"], row[_MEASURED]


def _accuracy(told: list[bool]) -> Estimate:
    """The share, with the error of Agresti and Coull; nan for fewer than 5 steps."""
    count = len(told)
    if count < _FEWEST:
        return Estimate(math.nan, math.nan, count - 1.0, count)
    middle = (sum(told) + 2) / (count + 4)
    return Estimate(sum(told) / count, math.sqrt(middle * (1 - middle) / (count + 4)), count - 1.0, count)


CLAIM = Claim(
    name="discriminator_sign",
    source="arXiv:2602.03392",
    statement="The sign of the mean of -A (S - E[S]) over a step's tokens, S = p (H + log p), tells whether the step "
    "raises or lowers the entropy.",
    refuted_by="A balanced accuracy, the mean of those on steps that rose and that fell by more than two standard "
    "errors, of one half or less. Where nearly all steps fall, plain accuracy would reward whoever always says so.",
    expected={
        "balanced": Expected("balanced accuracy of the sign", above=0.5),
        "rising": Expected("accuracy on steps that rose"),
        "falling": Expected("accuracy on steps that fell"),
    },
    families=("probed",),
    measure=measure,
    caveat="Steps count as independent, which those of one run are not quite.",
)
