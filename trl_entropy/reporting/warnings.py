"""Warnings about a run, found in its `metrics.jsonl` alone; each names the steps and the numbers behind it."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from trl_entropy.analysis.contents import steps_text
from trl_entropy.runs.metrics import metric_of
from trl_entropy.runs.self_checks import SELF_CHECK_LIMIT, advice, failed_self_checks
from trl_entropy.runs.strict_json import Row

Rows = Sequence[Row]

LOW_ESS_SHARE = 0.5
LOW_ENTROPY_SHARE = 0.25
# Completions tell too little of their prompts below this share of the most that the lower bound can be ...
LOW_INFORMATION_SHARE = 0.25
# ... and it is a template, not a fall of the entropy, while that of a completion is above this share of its first.
KEPT_ENTROPY_SHARE = 0.5


@dataclass(frozen=True)
class RunWarning:
    """
    One warning.

    Attributes:
        title: the problem in a few words.
        text: which numbers show it, and what to do.
        steps: the steps at which it was found.
        is_note: nothing need be wrong, but a reader must know it.
    """

    title: str
    text: str
    steps: tuple[int, ...]
    is_note: bool = False


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


def _template(metrics: Rows) -> Iterator[RunWarning]:
    """
    Completions no longer tell of their prompts, by more than two standard errors, and vary as they did.

    The share is of the logarithm of the number of prompts, not of the entropy: the bound cannot exceed the former, so
    that its share of the entropy of a long completion is small whatever the policy does.
    """
    lower, entropy = "mutual_information/lower", "mutual_information/conditional_entropy"
    rows = _having(metrics, lower, f"{lower}_stderr", entropy, "mutual_information/limit")
    low = [
        row["step"]
        for row in rows
        if row[lower] + 2 * row[f"{lower}_stderr"] < LOW_INFORMATION_SHARE * row["mutual_information/limit"]
        and row[entropy] > KEPT_ENTROPY_SHARE * rows[0][entropy]
    ]
    if low:
        yield RunWarning(
            "Completions do not depend on their prompts",
            f"mutual_information/lower and two of its standard errors are below {LOW_INFORMATION_SHARE:g} of "
            "mutual_information/limit, the most that it can be, while the entropy of a completion is above "
            f"{KEPT_ENTROPY_SHARE:g} of what it was at step {rows[0]['step']}: the policy answers different prompts "
            "alike, which its entropy does not show. Read completions of several prompts side by side, and look at "
            "what the reward pays that no prompt is needed for.",
            tuple(low),
        )


def _not_finite(metrics: Rows) -> Iterator[RunWarning]:
    """Metrics that are nan or infinite: those that must have a value, and those that can be undefined."""
    places = _places(metrics)
    undefined = {key: values for key, values in places.items() if _can_be_undefined(key)}
    broken = {key: values for key, values in places.items() if key not in undefined}
    if broken:
        text = "Find out what made them so before you trust the run: a diverged step, rewards, or data"
        yield RunWarning("Not a finite number", f"{_listed(broken)}. {text}.", _all_steps(broken))
    if undefined:
        text = (
            "These statistics have no value where a denominator is 0 or the steps are still few, and an interval has "
            "no end where the data set it none"
        )
        yield RunWarning("Undefined or without an end", f"{_listed(undefined)}. {text}.", _all_steps(undefined), True)


def _places(metrics: Rows) -> dict[str, dict[int, str]]:
    """By key the steps at which it is nan or infinite, and which; what has no value (null) is nan."""
    found: dict[str, dict[int, str]] = defaultdict(dict)
    for row in metrics:
        for key, given in row.items():
            if given is None:
                found[key][row["step"]] = "nan"
            elif isinstance(given, float) and not math.isfinite(given):
                found[key][row["step"]] = str(given)
    return found


def _can_be_undefined(key: str) -> bool:
    return key.endswith("_stderr") or ((known := metric_of(key)) is not None and known.can_be_undefined)


def _listed(places: Mapping[str, Mapping[int, str]]) -> str:
    """Keys by what they are and where, those of the same steps together."""
    keys: dict[str, list[str]] = defaultdict(list)
    for key, values in places.items():
        for value in dict.fromkeys(values.values()):
            steps = steps_text([step for step, given in values.items() if given == value])
            keys[f"{value} at {steps}"].append(key)
    return "; ".join(f"{place}: {', '.join(names)}" for place, names in keys.items())


def _all_steps(places: Mapping[str, Iterable[int]]) -> tuple[int, ...]:
    return tuple(sorted({step for steps in places.values() for step in steps}))


def _no_reward(metrics: Rows) -> Iterator[RunWarning]:
    """Every reward of the step is None or nan."""
    names = [name for name in sorted(set().union(*metrics)) if re.fullmatch(r"rewards/.*/mean", name)]
    without = [row["step"] for row in metrics if _has_no_reward(row, names)]
    if without:
        yield RunWarning(
            "No reward arrived",
            "Every reward of these steps is None or nan, so that they trained on nothing. Look at what the reward "
            "functions return for the completions of a step.",
            tuple(without),
        )


def _has_no_reward(row: Row, names: Sequence[str]) -> bool:
    rewards = [row[key] for key in names if key in row]
    rewards = rewards or [row[key] for key in ("reward",) if key in row]
    return bool(rewards) and all(value is None or math.isnan(value) for value in rewards)


def _self_checks(metrics: Rows) -> Iterator[RunWarning]:
    """A probe computed a number in two ways that differ by more than rounding."""
    failed: dict[str, dict[int, float]] = defaultdict(dict)
    for row in metrics:
        for key, value in failed_self_checks(row).items():
            failed[key][row["step"]] = abs(value)
    if failed:
        named = "; ".join(
            f"|{key}| is up to {max(values.values()):.2g} at {steps_text(list(values))}"
            for key, values in failed.items()
        )
        text = f"{named}; the limit is {SELF_CHECK_LIMIT:g}. {advice()}"
        yield RunWarning("A probe's self-check failed", text, _all_steps(failed))


def _learning_rate_0(metrics: Rows) -> Iterator[RunWarning]:
    """No step had a learning rate; a single step may be the first of a warm-up."""
    rates = [row["learning_rate"] for row in _having(metrics, "learning_rate")]
    if len(rates) > 1 and not any(rates):
        yield RunWarning(
            "The learning rate is 0",
            "No step changed the policy, and every change of its entropy is 0 or rounding. Set a learning_rate above "
            "0 to train.",
            tuple(row["step"] for row in metrics),
            True,
        )


def _no_signal(metrics: Rows) -> Iterator[RunWarning]:
    """In every group of the step all rewards are equal, so the gradient is zero."""
    silent = [row["step"] for row in _having(metrics, "frac_reward_zero_std") if row["frac_reward_zero_std"] == 1]
    if silent:
        text = "In every prompt group all completions got the same reward, so the policy gradient is zero."
        yield RunWarning("No learning signal", text, tuple(silent))


_CHECKS: tuple[Callable[[Rows], Iterator[RunWarning]], ...] = (
    _no_reward,
    _self_checks,
    _low_importance_ess,
    _noise_floor,
    _prediction_fails,
    _collapse,
    _template,
    _no_signal,
    _not_finite,
    _learning_rate_0,
)


def _having(metrics: Rows, *keys: str) -> list[Row]:
    """The rows in which all of these keys are finite numbers."""
    return [row for row in metrics if all(_is_number(row.get(key)) for key in keys)]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
