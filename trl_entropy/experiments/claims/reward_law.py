"""Whether reward follows R = -a exp(H) + b, with the same a and b at another learning rate."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from trl_entropy.analysis.run import Run
from trl_entropy.estimators.statistics.estimate import Estimate
from trl_entropy.estimators.statistics.moments import PairMoments
from trl_entropy.experiments.claims.claim import Claim, Expected, Runs, over_runs

_ENTROPY = "entropy/policy"
_MARGIN = 0.03  # of reward: that of one and a half standard errors of an evaluation of the quickstart


def measure(runs: Runs) -> dict[str, Estimate]:
    """The fit on each run, and what it leaves of the run of the same seed at a third of the learning rate."""
    found = {
        "fit": over_runs([fit(run) for run in runs["probed"]]),
        "line": over_runs([fit(run, of_entropy=True) for run in runs["probed"]]),
    }
    if runs.get("slow"):
        pairs = zip(runs["probed"], runs["slow"], strict=False)
        found["slow"] = over_runs([residual(first, slow) for first, slow in pairs])
    return found


def curve(run: Run) -> tuple[np.ndarray, np.ndarray]:
    """exp(H) and the mean reward of each step."""
    rows = [row for row in run.rows(_ENTROPY) if "reward" in row]
    return np.exp([row[_ENTROPY] for row in rows]), np.array([row["reward"] for row in rows])


def fit(run: Run, of_entropy: bool = False) -> float:
    """R^2 over the largest that the noise of the rewards allows; with `of_entropy` that of R = -a H + b."""
    x, y = curve(run)
    if of_entropy:
        x = np.log(x)
    groups = run.groups
    if groups.empty:
        return math.nan
    noise = groups.groupby("step")["reward_mean"].agg(lambda rewards: rewards.std() / math.sqrt(len(rewards)))
    mean_noise = float(np.sqrt((noise**2).mean()))
    pairs = PairMoments.empty()
    for predicted, reward in zip(-x, y, strict=True):
        pairs = pairs.update(float(predicted), float(reward), 0.0, mean_noise)
    return pairs.share_of_ceiling().value


def residual(first: Run, slow: Run) -> float:
    """Mean of the slow run's reward less the first run's law, over its steps at entropies that the first run had."""
    x, y = curve(first)
    slope, constant = np.polyfit(x, y, 1)
    there, rewards = curve(slow)
    within = (there >= x.min()) & (there <= x.max())
    return _mean(list(rewards[within] - (slope * there[within] + constant)))


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if len(values) else math.nan


CLAIM = Claim(
    name="reward_law",
    source="arXiv:2505.22617",
    statement="Reward is traded for entropy along R = -a exp(H) + b, and a and b are the same for several algorithms "
    "and settings of training.",
    refuted_by="A share below 0.9 of the variance of the steps' rewards that their noise leaves to explain; or a run "
    "at a third of the learning rate whose reward, at the entropies that it shares with the run of the same seed, is "
    "more than 0.03 from that run's law in the mean.",
    expected={
        "fit": Expected("R^2 over its ceiling", above=0.9),
        "slow": Expected("mean reward at a third of the learning rate, less the law", above=-_MARGIN, below=_MARGIN),
        "line": Expected("R^2 over its ceiling of R = -a H + b"),
    },
    families=("probed", "slow"),
    measure=measure,
    caveat="Rewards of the steps' own completions stand in for the paper's evaluations; any smooth curve of a "
    "quantity that falls while the reward rises fits well.",
)
