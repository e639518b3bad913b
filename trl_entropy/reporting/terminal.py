"""A run in a terminal: curves as lines of small bars, parts of the last measured step, warnings. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from trl_entropy.analysis import views
from trl_entropy.analysis.contents import steps_text
from trl_entropy.analysis.progress import progress_of
from trl_entropy.analysis.run import Run
from trl_entropy.reporting.page import plain
from trl_entropy.reporting.warnings import warnings_of
from trl_entropy.runs.metrics import PASS_AT_1

LEAST_WIDTH = 40
_CURVES = (
    ("entropy/policy", "entropy"), ("reward", "reward"), ("entropy/delta_measured", "entropy change, measured"),
    ("entropy/delta_linear", "the same, first order"), ("reward/delta_measured", "reward change, measured"),
    ("kl", "KL to the start policy"), ("completions/mean_length", "length"),
)  # fmt: skip
_NAMES, _NUMBERS = 25, 21  # columns
_MOST_WARNINGS = 6


@dataclass(frozen=True)
class Look:
    """
    How a screen is drawn.

    Attributes:
        width: of the terminal, in columns.
        levels: characters of rising height.
        bar: the character of a bar that lies.
        styled: whether bold and dim text may be used.
    """

    width: int = 80
    levels: str = "▁▂▃▄▅▆▇█"
    bar: str = "█"
    styled: bool = False

    def bold(self, text: str) -> str:
        """The text, bold where the terminal has styles."""
        return f"\x1b[1m{text}\x1b[0m" if self.styled else text


ASCII = {"levels": "_.-~=+*#", "bar": "#"}  # for terminals that have no other characters


def screen(run: Run, look: Look) -> list[str]:
    """The lines of a screen: where the run is, its curves, the parts of its last measured step, and warnings."""
    lines = [look.bold(plain(run.name)), str(progress_of(run)), ""]
    if run.steps.empty:
        return [*lines, "No step is written yet."]
    lines += _curves(run, look)
    lines += ["", *_parts(run, look)]
    return [*lines, "", *_warnings(run, look)]


def sparkline(values: Sequence[float], width: int, levels: str) -> str:
    """
    Numbers as characters of rising height, from the least to the largest; several steps that share a character are
    their mean, and one without a number is a space.
    """
    known = np.asarray(values, dtype=float)
    known = np.where(np.isfinite(known), known, np.nan)
    bins = np.array_split(known, min(width, len(known))) if len(known) else []
    means = [float(one[~np.isnan(one)].mean()) if (~np.isnan(one)).any() else math.nan for one in bins]
    finite = [mean for mean in means if not math.isnan(mean)]
    if not finite:
        return ""
    low, high = min(finite), max(finite)
    top = len(levels) - 1

    def character(mean: float) -> str:
        if math.isnan(mean):
            return " "
        return levels[round((mean - low) / (high - low) * top) if high > low else top // 2]

    return "".join(map(character, means))


def _curves(run: Run, look: Look) -> list[str]:
    found = []
    for key, name in _CURVES:
        if key in run.steps and run.steps[key].notna().any():
            values = run.steps[key].dropna()
            step = int(values.index[-1])
            error = run.steps[f"{key}_stderr"].get(step) if f"{key}_stderr" in run.steps else None
            found.append(_curve(name, values.tolist(), error, look))
    evaluated = run.training_evaluation
    if PASS_AT_1 in evaluated and "dataset" not in evaluated:
        found.append(_curve("held-out pass@1", evaluated[PASS_AT_1].dropna().tolist(), None, look))
    return found


def _curve(name: str, values: list[float], error: float | None, look: Look) -> str:
    number = _with_error(values[-1], error) if values else "-"
    room = max(look.width - _NAMES - _NUMBERS - 1, 8)
    return f"{name:<{_NAMES}}{number:<{_NUMBERS}} {sparkline(values, room, look.levels)}"


def _parts(run: Run, look: Look) -> list[str]:
    """What made the change of the last step that was measured, as bars around 0."""
    measured = run.rows("entropy/delta_measured")
    if not measured:
        return ["No step's entropy change has been measured yet."]
    row = measured[-1]
    change = _with_error(row["entropy/delta_measured"], row.get("entropy/delta_measured_stderr"))
    lines = [look.bold(f"Step {row['step']} changed the entropy by {change} nats per token")]
    table = views.parts(run)
    rows = table[(table["step"] == row["step"]) & (table["part"] != "rounding") & (table["change"] != 0)]
    largest = rows["change"].abs().max()
    half = max((look.width - _NAMES - _NUMBERS - 2) // 2, 4)
    for part, value in zip(rows["part"], rows["change"], strict=True):
        bar = look.bar * round(abs(value) / largest * half)
        drawn = f"{bar:>{half}}|" if value < 0 else f"{'':>{half}}|{bar}"
        lines.append(f"  {part.replace('_', ' '):<{_NAMES - 2}}{_with_error(value, None):<{_NUMBERS}} {drawn}")
    return lines


def _warnings(run: Run, look: Look) -> list[str]:
    found = [one for one in warnings_of(run.rows()) if not one.is_note]
    if not found:
        return ["No warnings."]
    lines = [look.bold(f"{len(found)} warning{'' if len(found) == 1 else 's'}; the page says what to do")]
    lines += [f"  {plain(one.title)}: {steps_text(one.steps)}" for one in found[:_MOST_WARNINGS]]
    return [*lines, "  ..."] if len(found) > _MOST_WARNINGS else lines


def _with_error(value: float, error: float | None) -> str:
    number = f"{value:+.3g}" if value < 0 or error is not None else f"{value:.4g}"
    return f"{number} ± {error:.2g}" if error is not None and math.isfinite(error) else number


def cut(line: str, width: int) -> str:
    """A line that is not wider than the terminal, in whose place it would take two; styles do not count."""
    plain_length = len(line.replace("\x1b[1m", "").replace("\x1b[0m", ""))
    return line if plain_length <= width else line[: len(line) - (plain_length - width)]
