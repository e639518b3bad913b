"""Which evaluated checkpoint has the largest value of a metric, or of a sum of several."""

from __future__ import annotations

import re
from pathlib import Path

from trl_entropy.runs.directory import CheckpointSummary, RunDirectory

_TERM = re.compile(r"\s*([+-])?\s*(?:(\d+(?:\.\d*)?|\.\d+)\s*\*\s*)?([A-Za-z_][\w@/]*)\s*")


def terms_of(by: str) -> dict[str, float]:
    """
    Metric -> its weight, of an expression such as `pass@1 - 0.1 * entropy_mean`.

    Raises:
        ValueError: when it is not understood.
    """
    found, place = dict[str, float](), 0
    while place < len(by):
        term = _TERM.match(by, place)
        if term is None or (place > 0 and term[1] is None):
            raise ValueError(
                f"{by!r} is not understood at {by[place:]!r}; write a metric, or a sum: pass@1 - 0.1*entropy_mean"
            )
        sign = -1.0 if term[1] == "-" else 1.0
        found[term[3]] = found.get(term[3], 0.0) + sign * float(term[2] or 1)
        place = term.end()
    if not found:
        raise ValueError("an empty expression; write a metric such as pass@1")
    return found


def best_step(run: Path, by: str) -> int | None:
    """The step of the evaluated checkpoint with the largest value, the start policy aside; None if there is none."""
    weights = terms_of(by)
    values = {one["step"]: _value(one, weights) for one in RunDirectory(run).checkpoint_summaries() if one["step"]}
    known = {step: value for step, value in values.items() if value is not None}
    return max(known, key=lambda step: (known[step], step)) if known else None


def _value(summary: CheckpointSummary, weights: dict[str, float]) -> float | None:
    total = 0.0
    for name, weight in weights.items():
        measured = summary["metrics"].get(name)
        if measured is None or measured["value"] is None:
            return None
        total += weight * measured["value"]
    return total
