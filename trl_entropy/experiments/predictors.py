"""
Every predictor of a step's entropy change on the same steps: `trl-entropy experiment predictors RUN [RUN ...]`.

Compares what published formulas, the past of the run and this package say of each step with the change that was
measured on half b of its probe batch, which none of them saw. Reads a run whose steps were probed, and trains nothing:

    entropy_probe: true
    likelihood_probe: true                # log-probabilities and entropies of the step's own tokens
    likelihood_probe_distribution: true   # for the formulas that need each token's whole distribution
    probe_files_keep: STEPS OF THE RUN
    entropy_probe_completions: next_rollouts, held_out or eval

Runs that differ in the seed alone are taken together too: with errors over all their steps, and over the seeds.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple, NotRequired, TypedDict

import torch

from trl_entropy.analysis.run import Run, load_run
from trl_entropy.estimators.entropy_change.published import published_predictions
from trl_entropy.estimators.statistics.calibration import wilson_interval
from trl_entropy.estimators.statistics.estimate import Estimate
from trl_entropy.estimators.statistics.moments import PairMoments, jackknife
from trl_entropy.experiments.output import Numbers, saved_figure, thirds, with_interval, write_numbers
from trl_entropy.runs.console import quiet_libraries
from trl_entropy.runs.counted import counted
from trl_entropy.runs.file_errors import describe

# Predictors in nats per token, whose slope has a meaning; the others are known up to a factor.
OWN = ("linear", "second_order", "trapezoid", "measured")
_MEAN = "mean_discriminator_before"
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
    "discriminator_exact": "-A (S - E[S])",
    "raising": "its rising part (OPEFO)",
    "lowering": "its falling part (OPEFO)",
    "high_entropy": "-A (log p + H), top fifth of H",
    "last_step": "the step before",
    "line": f"line through the last {_PAST}",
    "linear": "first order",
    "second_order": "second order",
    "trapezoid": "trapezoid",
    "measured": "measured on half a",
}
_JOINT = " + "  # between the names of runs that are taken together
_FROM_THE_PAST, _AFTER = ("last_step", "line"), ("trapezoid", "measured")
# What two runs of one setup may differ in; `model_config` names the folder of the seed's warm start.
_OF_A_RUN = ("seed", "data_seed", "output_dir", "logging_dir", "run_name", "hub_model_id", "model_config")


class Step(NamedTuple):
    """One step: the change measured on half b, and each prediction, with standard errors; 0 where there is none."""

    measured: float
    stderr: float
    predictions: dict[str, tuple[float, float]]
    known: dict[str, str]


class Score(TypedDict):
    """
    How well a predictor did: `r_squared` over its ceiling, the share of steps whose sign it told, and when it is
    `known`: from the `past`, from the step's completions and its gradient `before` it is made, or `after`.
    """

    known: str
    correlation: Numbers
    share_of_ceiling: Numbers
    slope: Numbers | None
    sign: Numbers
    num_steps: int
    over_seeds: NotRequired[Numbers]  # the correlation, with an interval over runs instead of steps


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
    means = torch.from_numpy(arrays[_MEAN]) if _MEAN in arrays else None
    published = published_predictions(logps, entropies, torch.from_numpy(advantages), torch.from_numpy(mask), means)
    found = {name: (value, 0.0) for name, value in (published | _from_the_past(step, past)).items()}
    for name in OWN:
        if (key := f"entropy/half_a_{name}") in row:
            found[name] = row[key], row[f"{key}_stderr"]
    return Step(row["entropy/half_b_measured"], row["entropy/half_b_measured_stderr"], found, _known(run, found))


def _known(run: Run, names: Iterable[str]) -> dict[str, str]:
    """When each prediction is known; the completions of the next step are drawn after this one."""
    late = OWN if run.config.get("entropy_probe_completions", "next_rollouts") == "next_rollouts" else _AFTER
    return {name: "past" if name in _FROM_THE_PAST else "after" if name in late else "before" for name in names}


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
    has_slope = name in (*OWN, *_FROM_THE_PAST)
    return {
        "known": steps[0].known[name],
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
    """Scores by run, part of the run and predictor; of runs that differ in the seed alone also of all their steps."""
    steps = {run: steps_of(run) for run in runs}
    found = {run.path.name: {part: scores(some) for part, some in thirds(steps[run]).items()} for run in runs}
    for same in alike(runs):
        if len(same) > 1:
            names = [run.path.name for run in same]
            parts = [thirds(steps[run]) for run in same]
            found[_JOINT.join(names)] = {
                part: _of_seeds([step for some in parts for step in some[part]], [found[name][part] for name in names])
                for part in parts[0]
            }
    return found


def _of_seeds(steps: Sequence[Step], each: Sequence[Mapping[str, Score]]) -> dict[str, Score]:
    """The scores on the steps of all runs, with the interval over the runs, whose own scores `each` has."""
    pooled = scores(steps)
    for name, score in pooled.items():
        score["over_seeds"] = over_seeds([table[name]["correlation"]["value"] for table in each if name in table])
    return pooled


def alike(runs: Sequence[Run]) -> list[list[Run]]:
    """The runs in groups whose settings differ in the seed and in names alone."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        settings = {name: value for name, value in run.config.items() if name not in _OF_A_RUN}
        groups.setdefault(json.dumps(settings, sort_keys=True, default=str), []).append(run)
    return list(groups.values())


def over_seeds(correlations: Sequence[float]) -> Numbers:
    """Mean of Fisher's z = atanh r over runs, with Student's t interval over them, as correlations."""
    z = torch.tensor([math.atanh(max(-1 + 1e-12, min(1 - 1e-12, r))) for r in correlations], dtype=torch.float64)
    stderr = float(z.std() / math.sqrt(len(z))) if len(z) > 1 else math.nan
    low, high = Estimate(float(z.mean()), stderr, len(z) - 1.0, len(z)).interval()
    return {"value": math.tanh(float(z.mean())), "low": math.tanh(low), "high": math.tanh(high)}


def markdown(result: dict[str, dict[str, dict[str, Score]]]) -> str:
    """A table for each run: the predictors, best first by correlation; and the correlations by third."""
    tables = []
    for name, parts in result.items():
        ordered = sorted(parts["all"].items(), key=lambda item: -_finite(item[1]["correlation"]["value"]))
        columns = [part for part in parts if part != "all"]
        seeds = ["over seeds"] if any("over_seeds" in score for score in parts["all"].values()) else []
        header = ["predictor", "known", "steps", "correlation", *seeds, "R^2 over its ceiling", "sign", "slope"]
        header += columns
        lines = [f"{name}", "", f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
        lines += [f"| {' | '.join(_cells(key, score, parts, columns))} |" for key, score in ordered]
        tables.append("\n".join(lines))
    return "\n\n".join(tables)


def _cells(name: str, score: Score, parts: dict[str, dict[str, Score]], columns: Sequence[str]) -> Iterator[str]:
    yield from (_LABELS[name], score["known"], str(score["num_steps"]))
    yield with_interval(score["correlation"], form=".2f")
    if "over_seeds" in score:
        yield with_interval(score["over_seeds"], form=".2f")
    yield f"{score['share_of_ceiling']['value']:.2f}"
    yield with_interval(score["sign"], form=".2f")
    yield "" if score["slope"] is None else with_interval(score["slope"], form=".2f")
    for part in columns:
        yield with_interval(parts[part][name]["correlation"], form=".2f") if name in parts[part] else "-"


def _finite(value: float) -> float:
    return value if math.isfinite(value) else -1.0


def draw(result: dict[str, dict[str, dict[str, Score]]], target: Path) -> None:
    """The correlations with their intervals, a panel for each run, and for runs of one setup one for all of them."""
    taken = {one for name in result if _JOINT in name for one in name.split(_JOINT)}
    result = {name: parts for name, parts in result.items() if name not in taken}
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
            axes.set(title=_title(name), xlim=(-1.05, 1.05))
            axes.set_xlabel("correlation with the measured change, 95 % intervals")
            axes.set_yticks(range(len(shown)), [_LABELS[key] for key in shown])


def _title(name: str) -> str:
    names = name.split(_JOINT)
    return name if len(names) == 1 else f"{names[0]} and {counted(len(names) - 1, 'other seed')}"


def main(argv: list[str]) -> None:
    """Print the tables; write `predictors.json` and `predictors.png` into the first run's report or `--output`."""
    parser = argparse.ArgumentParser(
        prog="trl-entropy experiment predictors",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run directory")
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
