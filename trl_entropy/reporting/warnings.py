"""Warnings about a run, found in its `metrics.jsonl` alone; each names the steps and the numbers behind it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from trl_entropy.runs.strict_json import Row

Rows = Sequence[Row]

LOW_ESS_SHARE = 0.5
LOW_ENTROPY_SHARE = 0.25


@dataclass(frozen=True)
class RunWarning:
    """
    One warning.

    Attributes:
        title: the problem in a few words.
        text: which numbers show it, and what to do.
        steps: the steps at which it was found.
    """

    title: str
    text: str
    steps: tuple[int, ...]


def warnings_of(metrics: Rows) -> list[RunWarning]:
    """All warnings about the lines of `metrics.jsonl`."""
    return [warning for check in _CHECKS for warning in check(metrics)]


def _low_importance_ess(metrics: Rows) -> Iterator[RunWarning]:
    """The effective sample size after the step is below half of the probe's completions."""
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
    """The measured change is not larger than rounding; a step with learning rate 0 is left out, it changes nothing."""
    low = [
        row["step"]
        for row in _having(metrics, "entropy/noise_floor", "entropy/delta_measured")
        if abs(row["entropy/delta_measured"]) <= row["entropy/noise_floor"] and row.get("learning_rate") != 0
    ]
    if low:
        yield RunWarning(
            "Noise floor reached",
            "|entropy/delta_measured| is not above entropy/noise_floor, the difference that rounding alone makes: the "
            "measured change says nothing at these steps.",
            tuple(low),
        )


def _prediction_fails(metrics: Rows) -> Iterator[RunWarning]:
    """The first-order prediction is off by more than 3 standard errors and by over half of the measured change."""
    failed = [
        row["step"]
        for row in _having(metrics, "entropy/error_linear", "entropy/error_linear_stderr", "entropy/delta_measured")
        if abs(row["entropy/error_linear"])
        > max(3 * row["entropy/error_linear_stderr"], 0.5 * abs(row["entropy/delta_measured"]))
    ]
    if failed:
        yield RunWarning(
            "First-order prediction fails",
            "|entropy/error_linear| is above 3 standard errors and above half of the measured change: the step is "
            "too large for the first-order prediction. Look at entropy/delta_trapezoid, or at "
            "entropy/delta_second_order with entropy_second_order: true.",
            tuple(failed),
        )


def _collapse(metrics: Rows) -> Iterator[RunWarning]:
    """The entropy is below a quarter of its value at the start."""
    rows = _having(metrics, "entropy/policy")
    low = [row["step"] for row in rows if row["entropy/policy"] < LOW_ENTROPY_SHARE * rows[0]["entropy/policy"]]
    if low:
        yield RunWarning(
            "Entropy has collapsed",
            f"entropy/policy is below {LOW_ENTROPY_SHARE:g} of its value at step {rows[0]['step']}.",
            tuple(low),
        )


def _not_finite(metrics: Rows) -> Iterator[RunWarning]:
    """A loss, gradient norm or entropy is nan or infinite."""
    keys = ("loss", "grad_norm", "entropy/policy", "entropy/delta_measured")
    bad = [row["step"] for row in metrics if any(not math.isfinite(row[k]) for k in keys if row.get(k) is not None)]
    if bad:
        yield RunWarning("Not a finite number", f"One of {', '.join(keys)} is nan or infinite.", tuple(bad))


def _no_signal(metrics: Rows) -> Iterator[RunWarning]:
    """In every group of the step all rewards are equal, so the gradient is zero."""
    silent = [row["step"] for row in _having(metrics, "frac_reward_zero_std") if row["frac_reward_zero_std"] == 1]
    if silent:
        text = "In every prompt group all completions got the same reward, so the policy gradient is zero."
        yield RunWarning("No learning signal", text, tuple(silent))


_CHECKS: tuple[Callable[[Rows], Iterator[RunWarning]], ...] = (
    _not_finite,
    _low_importance_ess,
    _noise_floor,
    _prediction_fails,
    _collapse,
    _no_signal,
)


def _having(metrics: Rows, *keys: str) -> list[Row]:
    return [row for row in metrics if all(row.get(key) is not None for key in keys)]
