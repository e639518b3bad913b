"""What a run did to entropy and reward, in sentences with errors. Imports no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pandas as pd

from trl_entropy.analysis.attribution import is_well_away
from trl_entropy.analysis.run import Run
from trl_entropy.runs.change_metrics import PARTS
from trl_entropy.runs.metrics import PASS_AT_1

_MOST_ENDS = 10  # steps at either end of the run that a mean is over, a fifth of the run at most


@dataclass(frozen=True)
class Sum:
    """A sum over steps, which are taken as independent, and its standard error."""

    value: float
    stderr: float
    num_steps: int


@dataclass(frozen=True)
class Sentence:
    """A sentence, and the step that it is about, if it is about one."""

    text: str
    step: int | None = None


def total(run: Run, key: str) -> Sum | None:
    """The sum of a key over the steps that have it with its standard error; None if none has."""
    table = run.steps
    if key not in table or f"{key}_stderr" not in table:
        return None
    known = table[[key, f"{key}_stderr"]].replace([np.inf, -np.inf], np.nan).dropna().to_numpy(dtype=float)
    return Sum(float(known[:, 0].sum()), float((known[:, 1] ** 2).sum() ** 0.5), len(known)) if len(known) else None


def summary(run: Run) -> list[Sentence]:
    """The sentences with which a page begins: entropy, reward, and the steps that moved the entropy most."""
    found = [
        _change_of(run, "entropy", "nats per token"),
        _ends_of(run, "entropy/policy", "Entropy", "nats per token"),
    ]
    found += [_change_of(run, "reward", ""), _ends_of(run, "reward", "Reward", ""), _held_out(run)]
    found += [_extreme(run, "lowered", -1.0), _extreme(run, "raised", 1.0)]
    return [sentence for sentence in found if sentence is not None]


def _change_of(run: Run, quantity: str, unit: str) -> Sentence | None:
    """The sum of the measured changes, how much of the predicted one momentum made, and what first order said."""
    measured = total(run, f"{quantity}/delta_measured")
    if measured is None:
        return None
    known, number = len(run.steps), measured.num_steps
    steps = (
        f"The {known} steps together" if number == known else f"{number} of {known} steps were measured; together they"
    )
    unsure = "" if abs(measured.value) > 2 * measured.stderr else ", which is within two standard errors of 0"
    about = f" {unit}" if unit else ""
    text = f"{steps} {_verb(measured.value)} the {quantity} by {_size(measured)}{about}{unsure}."
    linear = total(run, f"{quantity}/delta_linear")
    if linear is not None:
        text += (
            f" First order said {_signed(linear.value)} ± {linear.stderr:.2g}{_largest_part(run, quantity, linear)}."
        )
    return Sentence(text)


def _signed(value: float) -> str:
    return f"{value:+.3g}".replace("-", "−")


def _verb(value: float) -> str:
    return "lowered" if value < 0 else "raised"


def _size(measured: Sum) -> str:
    return f"{abs(measured.value):.3g} ± {measured.stderr:.2g}"


def _largest_part(run: Run, quantity: str, linear: Sum) -> str:
    """Which share the largest part has of the first-order change; empty if that is not well away from 0."""
    sums = {
        name: float(run.steps[f"{quantity}/delta_{name}"].sum())
        for name in PARTS
        if f"{quantity}/delta_{name}" in run.steps
    }
    if not sums or not is_well_away(linear.value, 2 * linear.stderr):
        return ""
    name = max(sums, key=lambda part: abs(sums[part]))
    return f", of which {name.replace('_', ' ')} made {100 * sums[name] / linear.value:.0f} %"


def _ends_of(run: Run, key: str, name: str, unit: str) -> Sentence | None:
    """The mean of the first and of the last steps, and their difference with its error by the scatter of steps."""
    values = run.steps[key].dropna() if key in run.steps else pd.Series(dtype=float)
    number = min(_MOST_ENDS, len(values) // 5)
    if number < 2:
        return None
    first, last = values.iloc[:number], values.iloc[-number:]
    change, error = last.mean() - first.mean(), math.sqrt((first.var() + last.var()) / number)
    verb = "rose" if change > 0 else "fell"
    about = f" {unit}" if unit else ""
    return Sentence(
        f"{name} of the step's own completions {verb} by {abs(change):.3g} ± {error:.2g}{about}, from "
        f"{first.mean():.3g} (first {number} steps) to {last.mean():.3g} (last {number})."
    )


def _held_out(run: Run) -> Sentence | None:
    table = run.training_evaluation
    if PASS_AT_1 not in table or "dataset" in table or len(table[PASS_AT_1].dropna()) < 2:
        return None
    values = table[PASS_AT_1].dropna()
    return Sentence(
        f"Held-out pass@1 went from {values.iloc[0]:.3g} at step {values.index[0]} to {values.iloc[-1]:.3g} at step "
        f"{values.index[-1]}."
    )


def _extreme(run: Run, verb: str, sign: float) -> Sentence | None:
    """The step whose measured change is the largest in one direction, and how many standard errors it is from 0."""
    key = "entropy/delta_measured"
    values = run.steps[key].dropna() * sign if key in run.steps else pd.Series(dtype=float)
    if values.empty or not values.max() > 0:
        return None
    step = int(values.idxmax())
    change, error = run.steps[key][step], run.steps.get(f"{key}_stderr", pd.Series(dtype=float)).get(step, np.nan)
    sure = f" ± {error:.2g}, {abs(change) / error:.1f} standard errors from 0" if error > 0 else ""
    return Sentence(f"Step {step} {verb} the entropy most: {_signed(change)}{sure}.", step)
