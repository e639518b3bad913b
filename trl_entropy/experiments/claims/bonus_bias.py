"""Whether an entropy bonus stays biased while covariance control, annealed, does not."""

from __future__ import annotations

import numpy as np

from trl_entropy.analysis.run import Run
from trl_entropy.estimators.statistics.estimate import Estimate
from trl_entropy.experiments.claims.claim import Claim, Expected, Runs, over_runs

_LAST = 10  # steps
_MARGIN = 0.03  # of reward


def measure(runs: Runs) -> dict[str, Estimate]:
    """Rewards and entropies at the end, less those of the run of the same seed without control."""
    found = {}
    for family in ("bonus", "covariance"):
        if not runs.get(family) or not runs.get("plain"):
            continue
        for name, key in (("", "reward"), ("_entropy", "entropy/policy")):
            pairs = zip(runs[family], runs["plain"], strict=False)
            found[f"{family}{name}"] = over_runs([at_end(one, key) - at_end(plain, key) for one, plain in pairs])
    return found


def at_end(run: Run, key: str) -> float:
    """Mean of the key over the last ten steps."""
    return float(np.mean([row[key] for row in run.rows(key)[-_LAST:]]))


CLAIM = Claim(
    name="bonus_bias",
    source="arXiv:2604.09676 (abstract)",
    statement="An entropy bonus is a dense bias that stays and ends at a worse policy; covariance control touches few "
    "tokens, and ends where no control would once its coefficient has gone to 0.",
    refuted_by="A constant bonus (0.03) whose reward over the last 10 of 80 steps is not below that without control; "
    "or Clip-Cov, switched off after 40 steps, whose reward there is more than 0.03 from that without control.",
    expected={
        "bonus": Expected("reward at the end with a constant bonus, less that without", below=0),
        "covariance": Expected(
            "reward at the end, 40 steps after Clip-Cov, less that without", above=-_MARGIN, below=_MARGIN
        ),
        "bonus_entropy": Expected("entropy at the end with the bonus, less that without, nats/token"),
        "covariance_entropy": Expected("entropy at the end, 40 steps after Clip-Cov, less that without, nats/token"),
    },
    families=("plain", "bonus", "covariance"),
    measure=measure,
    caveat="Asymptotics stand for 40 steps here, and annealing for switching off; a bonus that is switched off may "
    "well end there too.",
)
