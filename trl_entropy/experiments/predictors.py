"""
Every predictor of a step's entropy change on the same steps: `trl-entropy experiment predictors RUN [RUN ...]`.

Compares what published formulas, the past of the run and this package say of each step with the change that was
measured on half b of its probe batch, which none of them saw. Reads a run whose steps were probed, and trains nothing:

    entropy_probe: true
    likelihood_probe: true             # log-probabilities and entropies of the step's own tokens
    probe_files_keep: STEPS OF THE RUN
    entropy_probe_completions: next_rollouts, held_out or eval
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple, TypedDict

import torch

from trl_entropy.analysis.run import Run, load_run
from trl_entropy.estimators.entropy_change.published import published_predictions
from trl_entropy.estimators.statistics.calibration import wilson_interval
from trl_entropy.estimators.statistics.estimate import Estimate
from trl_entropy.estimators.statistics.moments import PairMoments, jackknife
from trl_entropy.experiments.output import Numbers, saved_figure, thirds, with_interval, write_numbers
from trl_entropy.runs.console import quiet_libraries
from trl_entropy.runs.file_errors import describe

# Predictors in nats per token, whose slope has a meaning; the others are known up to a factor.
OWN = ("linear", "second_order", "trapezoid", "measured")
_PAST = 10  # steps that the line through the past takes, at most
_LABELS = {
    "cov_natural": "-Cov(log p, A), Cui et al. Theorem 2",
    "cov_policy_gradient": "-Cov(log p, p A), Theorem 1",
    "cov_sequence": "-Cov over responses",
    "centred": "-A (log p + H)",
    "surprisal": "-A log p (STARE)",
    "discriminator": "-A p (log p + H)",
    "discriminator_centred": "the same, batch-centred",
    "steer": "STEER, paper",
    "steer_code": "STEER, code",
    "high_entropy": "-A (log p + H), top fifth of H",
    "last_step": "the step before",
    "line": f"line through the last {_PAST}",
    "linear": "first order",
    "second_order": "second order",
    "trapezoid": "trapezoid",
    "measured": "measured on half a",
}


class Step(NamedTuple):
    """One step: the change measured on half b, and each prediction, with standard errors; 0 where there is none."""

    measured: float
    stderr: float
    predictions: dict[str, tuple[float, float]]


class Score(TypedDict):
    """How well a predictor did: `r_squared` over its ceiling, and the share of steps whose sign it told."""

    correlation: Numbers
    share_of_ceiling: Numbers
    slope: Numbers | None
    sign: Numbers
    num_steps: int


def steps_of(run: Run) -> list[Step]:
    """
    The probed steps of a run, in order; those without files of the likelihood probe are left out.

    Raises:
        ValueError: if fewer than 9 are left, three for each third of the run.
    """
    rows = [row for row in run.rows() if "entropy/half_b_measured" in row]
    filed = set(run.probe_steps("likelihood")) & set(run.probe_steps("rollouts"))
    past: list[tuple[float, float]] = []
    steps = []
    for row in rows:
        step = int(row["step"])
        if step in filed:
            steps.append(_step(run, row, past))
        past.append((step, row["entropy/delta_measured"]))
    if len(steps) < 9:
        raise ValueError(
            f"{run.path} has {len(rows)} steps with halves of a probe batch and {len(steps)} of them with files of "
            "the likelihood probe; 9 or more are needed. Train with entropy_probe and likelihood_probe at the same "
            "cadence, entropy_probe_completions other than rollouts, and probe_files_keep at least the number of steps"
        )
    return steps


def _step(run: Run, row: dict[str, float], past: Sequence[tuple[float, float]]) -> Step:
    step = int(row["step"])
    arrays = run.probe_file("rollouts", step) | run.probe_file("likelihood", step)
    mask = arrays.get("loss_mask", arrays["completion_mask"])
    advantages = arrays["advantages"]
    if advantages.ndim > 1:
        raise ValueError(f"{run.path}: token_control changes the advantages of tokens, which no formula here covers")
    logps, entropies = (torch.from_numpy(arrays[name]) for name in ("logps_before", "entropy_before"))
    published = published_predictions(logps, entropies, torch.from_numpy(advantages), torch.from_numpy(mask))
    found = {name: (value, 0.0) for name, value in (published | _from_the_past(step, past)).items()}
    for name in OWN:
        if (key := f"entropy/half_a_{name}") in row:
            found[name] = row[key], row[f"{key}_stderr"]
    return Step(row["entropy/half_b_measured"], row["entropy/half_b_measured_stderr"], found)


def _from_the_past(step: int, past: Sequence[tuple[float, float]]) -> dict[str, float]:
    """The change of the step before, and the least-squares line through the last ones, continued to this step."""
    recent = list(past[-_PAST:])
    found = {"last_step": recent[-1][1]} if recent else {}
    if len(recent) >= 3:
        x, y = (torch.tensor(column, dtype=torch.float64) for column in zip(*recent, strict=True))
        slope = ((x - x.mean()) @ (y - y.mean())) / ((x - x.mean()) @ (x - x.mean()))
        found["line"] = float(y.mean() + slope * (step - x.mean()))
    return found


def scores(steps: Sequence[Step]) -> dict[str, Score]:
    """The scores of every predictor that at least 4 of these steps have; errors by the jackknife over steps."""
    found = {}
    for name in _LABELS:
        having = [step for step in steps if name in step.predictions]
        if len(having) >= 4:
            found[name] = _score(name, having)
    return found


def _score(name: str, steps: Sequence[Step]) -> Score:
    pairs = []
    for step in steps:
        value, stderr = step.predictions[name]
        pairs.append(PairMoments.empty().update(value, step.measured, stderr, step.stderr))

    told = sum(step.predictions[name][0] * step.measured > 0 for step in steps)
    low, high = wilson_interval(told, len(steps))
    has_slope = name in (*OWN, "last_step", "line")
    return {
        "correlation": _correlation(pairs),
        "share_of_ceiling": jackknife(pairs, PairMoments.share_of_ceiling).as_dict(),
        "slope": jackknife(pairs, PairMoments.corrected_slope).as_dict() if has_slope else None,
        "sign": {"value": told / len(steps), "low": low, "high": high},
        "num_steps": len(steps),
    }


def _correlation(pairs: Sequence[PairMoments]) -> Numbers:
    """With an interval by the jackknife of Fisher's z = atanh r, so that it stays within -1 and 1."""

    def z(pairs: PairMoments) -> Estimate:
        plain = pairs.correlation()
        return replace(plain, value=math.atanh(max(-1 + 1e-12, min(1 - 1e-12, plain.value))))

    estimate = jackknife(pairs, z)
    low, high = estimate.interval()
    return {"value": math.tanh(estimate.value), "low": math.tanh(low), "high": math.tanh(high)}


def analyse(runs: Sequence[Run]) -> dict[str, dict[str, dict[str, Score]]]:
    """Scores by run, part of the run and predictor; of several runs also of all their steps, as `all runs`."""
    found, everything = {}, []
    for run in runs:
        steps = steps_of(run)
        everything += steps
        found[run.path.name] = {part: scores(some) for part, some in thirds(steps).items()}
    if len(runs) > 1:
        found["all runs"] = {"all": scores(everything)}
    return found


def markdown(result: dict[str, dict[str, dict[str, Score]]]) -> str:
    """A table for each run: the predictors, best first by correlation; and the correlations by third."""
    tables = []
    for name, parts in result.items():
        ordered = sorted(parts["all"].items(), key=lambda item: -_finite(item[1]["correlation"]["value"]))
        columns = [part for part in parts if part != "all"]
        header = ["predictor", "steps", "correlation", "R^2 over its ceiling", "sign", "slope", *columns]
        lines = [f"| {name}: {' | '.join(header)} |", "|---" * len(header) + "|"]
        lines += [f"| {' | '.join(_cells(key, score, parts, columns))} |" for key, score in ordered]
        tables.append("\n".join(lines))
    return "\n\n".join(tables)


def _cells(name: str, score: Score, parts: dict[str, dict[str, Score]], columns: Sequence[str]) -> Iterator[str]:
    yield from (_LABELS[name], str(score["num_steps"]), with_interval(score["correlation"], form=".2f"))
    yield f"{score['share_of_ceiling']['value']:.2f}"
    yield with_interval(score["sign"], form=".2f")
    yield "" if score["slope"] is None else with_interval(score["slope"], form=".2f")
    for part in columns:
        yield f"{parts[part][name]['correlation']['value']:.2f}" if name in parts[part] else "-"


def _finite(value: float) -> float:
    return value if math.isfinite(value) else -1.0


def draw(result: dict[str, dict[str, dict[str, Score]]], target: Path) -> None:
    """The correlations with their intervals, a panel for each run."""
    shown = [key for key in reversed(_LABELS) if any(key in parts["all"] for parts in result.values())]
    with saved_figure(target, (4.2 * len(result) + 2.4, 4.6)) as figure:
        for axes, (name, parts) in zip(figure.subplots(1, len(result), sharey=True, squeeze=False)[0], result.items(),
                                       strict=True):  # fmt: skip
            table = parts["all"]
            for place, key in enumerate(shown):
                if key in table:
                    entry = table[key]["correlation"]
                    colour = "C1" if key in OWN else "C0"
                    axes.plot([entry["low"], entry["high"]], [place, place], color=colour)
                    axes.plot(entry["value"], place, "o", color=colour)
            axes.axvline(0, color="0.8", zorder=0)
            axes.set(title=name, xlim=(-1.05, 1.05), xlabel="correlation with the measured change, 95 % intervals")
            axes.set_yticks(range(len(shown)), [_LABELS[key] for key in shown])


def main(argv: list[str]) -> None:
    """Print the tables; write `predictors.json` and `predictors.png` into the first run's report or `--output`."""
    parser = argparse.ArgumentParser(
        prog="trl-entropy experiment predictors",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run directory; runs may differ in the seed")
    parser.add_argument("--output", type=Path, help="folder to write to (default: RUN/report of the first run)")
    options = parser.parse_args(argv)
    quiet_libraries()
    try:
        runs = [load_run(path) for path in options.runs]
        result = analyse(runs)
    except ValueError as error:
        sys.exit(f"Error: {describe(error)}.")
    output = options.output or runs[0].path / "report"
    output.mkdir(parents=True, exist_ok=True)
    write_numbers(output / "predictors.json", result)
    draw(result, output / "predictors.png")
    print(f"{markdown(result)}\n\n{output / 'predictors.json'}\n{output / 'predictors.png'}")
