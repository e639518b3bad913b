"""Which evaluated checkpoint is the best by a metric, and which others cannot be told from it; paired by problem."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from trl_entropy.analysis.comparison import student_t
from trl_entropy.runs.directory import RunDirectory
from trl_entropy.runs.evaluated import terms_of
from trl_entropy.runs.reading import reading

# Metric -> its numerator and denominator among the columns of `prompts.parquet`; pass@k is a column of its own.
_RATIOS = {
    "greedy_accuracy": ("greedy_correct", None),
    "well_formed": ("num_well_formed", "num_samples"),
    "answer_tags": ("num_answer_tags", "num_samples"),
    "clipped": ("num_clipped", "num_samples"),
    "undecided": ("num_undecided", "num_samples"),
    "length_mean": ("num_tokens", "num_samples"),
    "entropy_mean": ("entropy_sum", "num_tokens"),
    "surprisal_mean": ("surprisal_sum", "num_tokens"),
    "distinct_answers": ("distinct_answers", None),
}


class Choice(NamedTuple):
    """
    The best checkpoint.

    Attributes:
        by: what it is the best by.
        step: of the checkpoint with the largest value.
        table: a row for each checkpoint, the best first: `step`, `value`, `probability` (that it is the best, over
            resampled problems), `difference` from the best and the ends `low` and `high` of its 95 % interval, and
            `tied` (whether the interval holds 0).
        num_problems: that all of them were evaluated on.
    """

    by: str
    step: int
    table: pd.DataFrame
    num_problems: int


def best_checkpoint(run: Path, by: str, num_resamples: int = 10_000, seed: int = 0) -> Choice:
    """
    The evaluated checkpoint with the largest value of `by`; put a minus before a metric of which less is better.

    The checkpoints were evaluated on the same problems, so they are compared by problem: the probability to be the
    best is the share of bootstrap samples of the problems in which one is, and the interval of a difference is
    Student's, by the jackknife over problems, for one comparison. The value of the one that is chosen is by the choice
    itself somewhat too large.

    Args:
        run: a run directory with evaluations of `trl-entropy evaluate`.
        num_resamples: bootstrap samples.

    Raises:
        ValueError: when fewer than two checkpoints are evaluated, with other settings or on other problems, or for a
            metric that they do not have.
    """
    weights, prompts = terms_of(by), _tables(run)
    steps = sorted(prompts)
    # (checkpoint, metric, problem)
    tops, bottoms = (np.array(part) for part in zip(*(_sums(prompts[step], weights) for step in steps), strict=True))
    factors, num = np.array([*weights.values()]), tops.shape[2]

    def values(counts: np.ndarray) -> np.ndarray:
        """Of each checkpoint, with each problem counted so often: (samples, problems) -> (samples, checkpoints)."""
        with np.errstate(invalid="ignore", divide="ignore"):
            ratios = (tops @ counts.T) / (bottoms @ counts.T)
        return np.einsum("m,cms->sc", factors, ratios)

    (value,) = values(np.ones((1, num)))
    best = int(np.nanargmax(value))
    resampled = values(np.random.default_rng(seed).multinomial(num, np.full(num, 1 / num), size=num_resamples))
    largest = resampled == np.nanmax(resampled, axis=1, keepdims=True)
    probability = (largest / largest.sum(1, keepdims=True)).mean(0)  # several that are equal share a sample
    differences = values(1.0 - np.eye(num))
    differences = differences - differences[:, [best]]
    stderr = np.sqrt((num - 1) / num * ((differences - differences.mean(0)) ** 2).sum(0))
    margin = student_t(num - 1) * stderr
    difference = value - value[best]
    table = pd.DataFrame(
        {
            "step": steps,
            "value": value,
            "probability": probability,
            "difference": difference,
            "low": difference - margin,
            "high": difference + margin,
            "tied": difference + margin >= 0,
        }
    )
    return Choice(by, steps[best], table.sort_values("value", ascending=False, ignore_index=True), num)


def _tables(run: Path) -> dict[int, pd.DataFrame]:
    """The problems of each evaluated checkpoint, in the same order."""
    directory = RunDirectory(run)
    summaries = directory.checkpoint_summaries()
    if len(summaries) < 2:
        raise ValueError(
            f"{run} has {len(summaries)} evaluated checkpoints, and two are needed. Call "
            f"trl-entropy evaluate --run {run}"
        )
    first = summaries[0]
    found = dict[int, pd.DataFrame]()
    for summary in summaries:
        other = [name for name, value in first["settings"].items() if summary["settings"].get(name) != value]
        if other:
            raise ValueError(
                f"{run}: steps {first['step']} and {summary['step']} were evaluated with other settings "
                f"({', '.join(other)}). Call trl-entropy evaluate --run {run} to evaluate all of them alike"
            )
        path = directory.checkpoint_folder(summary["step"]) / "prompts.parquet"
        with reading(path):
            found[summary["step"]] = pd.read_parquet(path).set_index("prompt_id").sort_index()
    index = found[first["step"]].index
    for step, table in found.items():
        if not table.index.equals(index):
            raise ValueError(f"{run}: steps {first['step']} and {step} were evaluated on other problems")
    return found


def _sums(prompts: pd.DataFrame, weights: Mapping[str, float]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Numerator and denominator of each metric by problem."""
    ones = np.ones(len(prompts))
    tops, bottoms = [], []
    for name in weights:
        ratio = (name, None) if name.startswith("pass@") else _RATIOS.get(name, (f"{name}/sum", f"{name}/num"))
        if ratio[0] not in prompts:
            own = [column.removesuffix("/sum") for column in prompts if column.endswith("/sum")]
            known = [*(column for column in prompts if column.startswith("pass@")), *_RATIOS, *own]
            raise ValueError(f"there is no metric {name!r}; the evaluations have {', '.join(known)}")
        tops.append(prompts[ratio[0]].to_numpy(float))
        bottoms.append(ones if ratio[1] is None else prompts[ratio[1]].to_numpy(float))
    return tops, bottoms
