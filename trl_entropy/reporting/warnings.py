"""What a reader of a run should be warned of, from its files alone: each warning with the numbers that raised it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

Rows = Sequence[dict[str, Any]]

LOW_ESS_SHARE = 0.5
LOW_ENTROPY_SHARE = 0.25


@dataclass(frozen=True)
class RunWarning:
    """
    One warning.

    Attributes:
        title: what is the matter, in a few words.
        text: the numbers, and what to do.
        steps: at which steps.
    """

    title: str
    text: str
    steps: tuple[int, ...]


def warnings_of(metrics: Rows) -> list[RunWarning]:
    """All warnings that the lines of `metrics.jsonl` give rise to."""
    return [warning for check in _CHECKS for warning in check(metrics)]


def _low_importance_ess(metrics: Rows) -> Iterator[RunWarning]:
    """Fewer than half of the probe's completions count after the step: the measured change is not to be trusted."""
    low = [
        row["step"]
        for row in _having(metrics, "entropy/importance_ess", "entropy/num_completions")
        if row["entropy/importance_ess"] < LOW_ESS_SHARE * row["entropy/num_completions"]
    ]
    if low:
        yield RunWarning(
            "Importance weights are uneven",
            f"entropy/importance_ess is below {LOW_ESS_SHARE:g} of the probe batch: the step moved the policy so far "
            "that few completions carry the measured change. Raise entropy_probe_num_completions or lower the "
            "learning rate.",
            tuple(low),
        )


def _noise_floor(metrics: Rows) -> Iterator[RunWarning]:
    """The change is no larger than what scoring in other chunks makes; a step with learning rate 0 has none."""
    low = [
        row["step"]
        for row in _having(metrics, "entropy/noise_floor", "entropy/delta_measured")
        if abs(row["entropy/delta_measured"]) <= row["entropy/noise_floor"] and row.get("learning_rate") != 0
    ]
    if low:
        yield RunWarning(
            "Noise floor reached",
            "|entropy/delta_measured| is not above entropy/noise_floor, what rounding alone makes of the same scores: "
            "nothing was measured there.",
            tuple(low),
        )


def _prediction_fails(metrics: Rows) -> Iterator[RunWarning]:
    """The first-order prediction misses the measured change by more than 3 paired standard errors and half of it."""
    failed = [
        row["step"]
        for row in _having(metrics, "entropy/error_linear", "entropy/error_linear_stderr", "entropy/delta_measured")
        if abs(row["entropy/error_linear"])
        > max(3 * row["entropy/error_linear_stderr"], 0.5 * abs(row["entropy/delta_measured"]))
    ]
    if failed:
        yield RunWarning(
            "Linear regime left",
            "|entropy/error_linear| is above 3 standard errors and above half of the measured change: the step is "
            "too large for the first-order prediction; see the second order (entropy_second_order) and trapezoid.",
            tuple(failed),
        )


def _collapse(metrics: Rows) -> Iterator[RunWarning]:
    """Entropy fell below a quarter of its start."""
    rows = _having(metrics, "entropy/policy")
    low = [row["step"] for row in rows if row["entropy/policy"] < LOW_ENTROPY_SHARE * rows[0]["entropy/policy"]]
    if low:
        yield RunWarning(
            "Entropy has collapsed",
            f"entropy/policy is below {LOW_ENTROPY_SHARE:g} of its value at step {rows[0]['step']}.",
            tuple(low),
        )


def _not_finite(metrics: Rows) -> Iterator[RunWarning]:
    """A loss, gradient norm or entropy that is not a number."""
    keys = ("loss", "grad_norm", "entropy/policy", "entropy/delta_measured")
    bad = [row["step"] for row in metrics if any(not math.isfinite(row[k]) for k in keys if row.get(k) is not None)]
    if bad:
        yield RunWarning("Not a finite number", f"one of {', '.join(keys)} is nan or infinite.", tuple(bad))


def _no_signal(metrics: Rows) -> Iterator[RunWarning]:
    """Every group of a step got equal rewards: its gradient is zero."""
    silent = [row["step"] for row in _having(metrics, "frac_reward_zero_std") if row["frac_reward_zero_std"] == 1]
    if silent:
        yield RunWarning("No learning signal", "all completions of every prompt were rewarded equally.", tuple(silent))


_CHECKS: tuple[Callable[[Rows], Iterator[RunWarning]], ...] = (
    _not_finite,
    _low_importance_ess,
    _noise_floor,
    _prediction_fails,
    _collapse,
    _no_signal,
)


def _having(metrics: Rows, *keys: str) -> list[dict[str, Any]]:
    return [row for row in metrics if all(row.get(key) is not None for key in keys)]
