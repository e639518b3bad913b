"""Whether tokens that lower the entropy outweigh those that raise it."""

from __future__ import annotations

import math

import numpy as np
import torch

from trl_entropy.analysis.attribution import attribution_table, own_rows
from trl_entropy.analysis.run import Run
from trl_entropy.analysis.tokens import own_tokens
from trl_entropy.estimators.entropy_change.published import token_changes
from trl_entropy.estimators.statistics.estimate import Estimate
from trl_entropy.experiments.claims.claim import Claim, Expected, Runs, of_each_run


def measure(runs: Runs) -> dict[str, Estimate]:
    """From the paper's first-order change of each token, and from the attribution (T9) of each token."""
    return of_each_run(runs["probed"], _shares)


def _shares(run: Run) -> dict[str, float]:
    flows = [flow for step in run.probe_steps("likelihood") if (flow := formula(run, step)) is not None]
    tokens = own_rows(attribution_table(run, by_token=True))
    found = {"formula": math.nan, "steps": math.nan, "attribution": math.nan}
    if flows:
        raising, lowering = (np.array(flow) for flow in zip(*flows, strict=True))
        found |= {"formula": float(lowering.sum() / (raising.sum() + lowering.sum()))}
        found |= {"steps": float((lowering > raising).mean())}
    if not tokens.empty:
        parts = tokens["attribution"]
        found["attribution"] = float(-parts[parts < 0].sum() / parts.abs().sum())
    return found


def formula(run: Run, step: int) -> tuple[float, float] | None:
    """The raising and the lowering flow of a step, both as positive numbers; None without the file's E[S]."""
    scores = run.probe_file("likelihood", step)
    if "mean_discriminator_before" not in scores:
        return None
    own = torch.from_numpy(own_tokens(scores))
    advantages = torch.from_numpy(run.probe_file("rollouts", step, ["advantages"])["advantages"])
    names = ("logps_before", "entropy_before", "mean_discriminator_before")
    logps, entropy, means = (torch.from_numpy(scores[name]).double()[own] for name in names)
    changes = token_changes(logps, entropy, advantages.double()[:, None].expand_as(own)[own], means)
    return float(changes.clamp(min=0).sum()), float(-changes.clamp(max=0).sum())


CLAIM = Claim(
    name="lowering_outweighs",
    source="arXiv:2605.11491",
    statement="Tokens whose update lowers the entropy consistently outweigh those whose update raises it, and this "
    "imbalance is the collapse.",
    refuted_by="A share of the lowering tokens in the sum of absolute changes, over a run, below one half: by the "
    "paper's first-order change of each token by itself, or by each token's part in the step that was made (T9).",
    expected={
        "formula": Expected("share of the lowering tokens, by the formula", above=0.5),
        "attribution": Expected("share of the lowering tokens, by attribution of the step that was made", above=0.5),
        "steps": Expected("share of steps in which they outweigh the raising ones, by the formula"),
    },
    families=("probed",),
    measure=measure,
    caveat="Attribution covers this step's gradient, not the momentum, which is two thirds of the quickstart's fall.",
)
