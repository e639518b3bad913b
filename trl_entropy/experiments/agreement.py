"""
Predicted against measured entropy changes over a run: `trl-entropy experiment agreement RUN [RUN...]`.

Reads `metrics.jsonl` of runs in which every step was probed (configs/entropy-study.yaml), and trains nothing; if some
steps were not, sums over steps are left out. The
change is predicted on half a of each probe batch and measured on half b, so that the errors of the two are
independent. With `--fresh-completions N` the sum of all changes is compared with the difference in entropy between the
first and the last policy, each on N fresh completions of its own.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal, NotRequired, TypedDict

from trl_entropy.estimators.statistics.estimate import Estimate
from trl_entropy.estimators.statistics.moments import PairMoments, jackknife
from trl_entropy.experiments.output import (
    Numbers,
    add_import_options,
    saved_figure,
    thirds,
    with_interval,
    write_numbers,
)
from trl_entropy.runs.console import quiet_libraries
from trl_entropy.runs.counted import counted
from trl_entropy.runs.directory import RunDirectory
from trl_entropy.runs.file_errors import describe

Predictor = Literal["linear", "second_order", "trapezoid", "measured"]
PREDICTORS: tuple[Predictor, ...] = ("linear", "second_order", "trapezoid", "measured")
RIVALS = ("cov_natural", "cov_policy_gradient")
Rows = Sequence[Numbers]


class Integral(TypedDict):
    """The start and the sum of changes so far before each step, with errors; its distance from fresh entropies."""

    values: list[float]
    stderr: list[float]
    largest_deviation: float
    share_within_2_stderr: float


class Integrals(TypedDict):
    """
    The entropy of each step's fresh completions, and an [`Integral`] for each predictor that was logged, unless
    `num_unprobed` steps between the first and the last probed one were not probed: their changes are not known.
    """

    num_unprobed: int
    steps: list[float]
    fresh: list[float]
    fresh_stderr: list[float]
    fresh_num_prompts: list[float | None]
    linear: NotRequired[Integral]
    second_order: NotRequired[Integral]
    trapezoid: NotRequired[Integral]
    measured: NotRequired[Integral]


class EndPoint(TypedDict):
    """Entropy of the first and the last policy and its change; for each predictor the sum of changes over that."""

    start: Numbers
    end: Numbers
    change: float
    linear: NotRequired[Numbers]
    second_order: NotRequired[Numbers]
    trapezoid: NotRequired[Numbers]
    measured: NotRequired[Numbers]


class Result(TypedDict):
    """What `agreement.json` holds of a run; keys of the tables are parts of the run, then predictors."""

    end_point: NotRequired[EndPoint]
    run: str
    num_steps: int
    num_completions: float
    across_halves: dict[str, dict[str, dict[str, Numbers]]]
    rivals: dict[str, dict[str, Numbers]]
    placebo: dict[str, dict[str, Numbers]]
    same_sample: dict[str, Numbers | None]
    integral: Integrals


def probed_rows(path: Path) -> Rows:
    """
    The logged rows of the probed steps of a run.

    Raises:
        ValueError: if there are fewer than 9, three for each third of the run.
    """
    rows = [row for row in RunDirectory(path).metrics() if "entropy/half_a_measured" in row]
    if len(rows) < 9:
        raise ValueError(
            f"{path} has {counted(len(rows), 'step')} probed on completions other than its own; 9 or more are needed. "
            "Train with entropy_probe=True, and entropy_probe_completions other than rollouts."
        )
    return rows


def cross_pairs(rows: Rows, predictor: str) -> list[PairMoments]:
    """A pair for each step: predicted on half a, measured on half b, so that their errors are independent."""
    x, y = f"entropy/half_a_{predictor}", "entropy/half_b_measured"
    pairs = [(row[x], row[y], row[f"{x}_stderr"], row[f"{y}_stderr"]) for row in rows if x in row]
    return [PairMoments.empty().update(*pair) for pair in pairs]


def agreement(rows: Rows) -> dict[str, dict[str, Estimate]]:
    """Slope, corrected slope, correlation, R^2 and its ceiling for each predictor across halves, jackknife errors."""
    statistics: dict[str, Callable[[PairMoments], Estimate]] = {
        "slope": PairMoments.slope,
        "corrected_slope": PairMoments.corrected_slope,
        "correlation": PairMoments.correlation,
        "r_squared": PairMoments.r_squared,
        "ceiling_r_squared": PairMoments.ceiling_r_squared,
        "share_of_ceiling": PairMoments.share_of_ceiling,
    }
    table: dict[str, dict[str, Estimate]] = {}
    for predictor in PREDICTORS:
        if pairs := cross_pairs(rows, predictor):
            table[predictor] = {name: jackknife(pairs, statistic) for name, statistic in statistics.items()}
    return table


def rival_correlations(rows: Rows) -> dict[str, Estimate]:
    """Correlation of the rivals (T11), and of the first order, with the change measured on the whole probe batch."""
    found = {}
    for name in (*RIVALS, "linear"):
        moments = PairMoments.empty()
        for row in rows:
            moments = moments.update(row[f"entropy/delta_{name}"], row["entropy/delta_measured"])
        found[name] = moments.correlation()
    return found


def placebo(rows: Rows) -> dict[str, Estimate] | None:
    """
    Slopes on the prediction of the placebo, which takes the update of an earlier step; None without a placebo.

    Returns:
        `raw`: slope of the measured change. Updates of one run share a direction and shrink together, so that it need
        not be 0.
        `left_over`: slope of the measured change less the prediction from the step's own update. It must be 0, since
        another step's update can say nothing beyond what the step's own update says.
    """
    rows = [row for row in rows if "entropy/delta_placebo" in row]
    if len(rows) < 3:
        return None
    own = "second_order" if "entropy/delta_second_order" in rows[0] else "linear"
    found = {}
    for name in ("raw", "left_over"):
        pairs = [
            PairMoments.empty().update(
                row["entropy/delta_placebo"],
                row["entropy/delta_measured"] - (row[f"entropy/delta_{own}"] if name == "left_over" else 0.0),
            )
            for row in rows
        ]
        found[name] = jackknife(pairs, PairMoments.slope)
    return found


def num_unprobed(rows: Rows, first: float, last: float) -> int:
    """How many of the steps `first` to `last` are not among the probed ones; their changes are in no sum."""
    return round(last - first) + 1 - len({row["step"] for row in rows if first <= row["step"] <= last})


def integrals(rows: Rows) -> Integrals:
    """
    The sums of predicted changes against the entropy of each step's fresh completions.

    Standard errors take the first entropy and all changes as independent, since each has a probe batch of its own.
    There are no sums if a step between the first and the last probed one was not probed.
    """
    fresh = [row["entropy/probe_batch"] for row in rows]
    errors = [row["entropy/probe_batch_stderr"] for row in rows]
    result: Integrals = {
        "num_unprobed": num_unprobed(rows, rows[0]["step"], rows[-1]["step"]),
        "steps": [row["step"] for row in rows],
        "fresh": fresh,
        "fresh_stderr": errors,
        "fresh_num_prompts": [row.get("entropy/num_prompts") for row in rows],
    }
    for name in PREDICTORS:
        if result["num_unprobed"] or f"entropy/delta_{name}" not in rows[0]:
            continue
        total, variance, values, stderrs, deviations = fresh[0], errors[0] ** 2, [fresh[0]], [errors[0]], []
        for before, row in itertools.pairwise(rows):
            total += before[f"entropy/delta_{name}"]
            variance += before[f"entropy/delta_{name}_stderr"] ** 2
            values.append(total)
            stderrs.append(math.sqrt(variance))
            combined = math.sqrt(variance + row["entropy/probe_batch_stderr"] ** 2)
            deviations.append((total - row["entropy/probe_batch"]) / combined)
        within = sum(abs(d) <= 2 for d in deviations) / len(deviations)
        result[name] = {
            "values": values,
            "stderr": stderrs,
            "largest_deviation": max(deviations, key=abs),
            "share_within_2_stderr": within,
        }
    return result


def end_point(rows: Rows, fall: tuple[Estimate, Estimate]) -> EndPoint:
    """
    The sum of all steps' changes over the entropy change between the first and the last policy.

    Args:
        rows: of the probed steps.
        fall: entropy of the first and of the last policy, nats per token, each on fresh completions.

    Returns:
        Each predictor's ratio has a standard error to first order in the errors of both.
    """
    start, end = fall
    change, variance = end.value - start.value, start.stderr**2 + end.stderr**2
    result: EndPoint = {"start": start.as_dict(), "end": end.as_dict(), "change": change}
    for name in PREDICTORS:
        if f"entropy/delta_{name}" in rows[0]:
            total = sum(row[f"entropy/delta_{name}"] for row in rows)
            total_variance = sum(row[f"entropy/delta_{name}_stderr"] ** 2 for row in rows)
            ratio = total / change
            stderr = math.sqrt(total_variance + ratio**2 * variance) / abs(change)
            result[name] = {"sum": total, "ratio": ratio, "ratio_stderr": stderr}
    return result


def analyse(path: Path, num_fresh: int = 0, may_import: bool = False, trainer_factory: str | None = None) -> Result:
    """All numbers of one run; with `num_fresh` its first and last policy, see [`Checkpoint.read`], draw as many."""
    rows = probed_rows(path)
    last = rows[-1]
    if num_fresh:
        _check_all_probed(path, rows)
    result: Result = {
        "run": path.name,
        "num_steps": len(rows),
        "num_completions": last["entropy/num_completions"],
        "across_halves": {
            part: {k: {n: e.as_dict() for n, e in v.items()} for k, v in agreement(some).items()}
            for part, some in thirds(rows).items()
        },
        "rivals": {
            part: {k: e.as_dict() for k, e in rival_correlations(some).items()} for part, some in thirds(rows).items()
        },
        "placebo": {
            part: {k: e.as_dict() for k, e in found.items()}
            for part, some in thirds(rows).items()
            if (found := placebo(some))
        },
        "same_sample": {name: _running(last, f"same_sample_{name}_slope") for name in PREDICTORS[:3]},
        "integral": integrals(rows),
    }
    if num_fresh:
        from trl_entropy.experiments.fresh_entropy import entropy_fall

        result["end_point"] = end_point(rows, entropy_fall(path, num_fresh, 0, may_import, trainer_factory))
    return result


def _check_all_probed(path: Path, rows: Rows) -> None:
    last_step = max(row["step"] for row in RunDirectory(path).metrics())
    if missing := num_unprobed(rows, 1, last_step):
        raise ValueError(
            f"{path}: {missing} of {last_step:g} steps were not probed, so that the sum of changes is not the change "
            "between the first and the last policy. Leave out --fresh-completions, or train with "
            "entropy_probe_every=1."
        )


def _running(row: Numbers, name: str) -> Numbers | None:
    key = f"entropy/{name}"
    return {"value": row[key], "stderr": row[f"{key}_stderr"]} if key in row else None


def markdown(results: list[Result]) -> str:
    """The tables of docs/results/diary.md; a table without rows is left out."""
    sections = {
        "run | steps | predictor | slope corrected for noise | correlation | R^2 | its ceiling | share of it": _across,
        "run | sum of changes | largest deviation, standard errors | steps within 2": _integral_rows,
        "run | entropy, first -> last policy | sum of changes | sum / change of the entropy": _end_point_rows,
        "run | steps | slope on the placebo | slope of measured - predicted on the placebo": _placebo_rows,
        "run | slope on the same sample: first order | second order | trapezoid": _same_sample_rows,
        "run | steps | correlation: first order | -Cov(log pi, A) | -Cov(log pi, pi A)": _rival_rows,
    }
    tables = []
    for header, rows_of in sections.items():
        rows = [f"| {result['run']} | {' | '.join(row)} |" for result in results for row in rows_of(result)]
        if rows:
            tables.append("\n".join([f"| {header} |", "|---" * (header.count("|") + 1) + "|", *rows]))
    return "\n\n".join([*tables, *filter(None, map(_note_on_sums, results))])


def _note_on_sums(result: Result) -> str | None:
    """Why a run has no sums of changes in the tables; None if it has."""
    steps, missing = result["integral"]["steps"], result["integral"]["num_unprobed"]
    if not missing:
        return None
    return (
        f"{result['run']}: {missing} of the steps {steps[0]:g} to {steps[-1]:g} were not probed, so that changes are "
        "not summed and compared with fresh entropies. Train with entropy_probe_every=1 for that."
    )


def _across(result: Result) -> Iterator[list[str]]:
    for part, table in result["across_halves"].items():
        for predictor, values in table.items():
            cells = [f"{values[k]['value']:.3f}" for k in ("correlation", "r_squared", "ceiling_r_squared")]
            yield [
                part,
                predictor,
                with_interval(values["corrected_slope"], form=".3f"),
                *cells,
                _with_error(values["share_of_ceiling"]),
            ]


def _integral_rows(result: Result) -> Iterator[list[str]]:
    for name in PREDICTORS:
        if entry := result["integral"].get(name):
            yield [name, f"{entry['largest_deviation']:+.2f}", f"{entry['share_within_2_stderr']:.0%}"]


def _end_point_rows(result: Result) -> Iterator[list[str]]:
    if (end := result.get("end_point")) is None:
        return
    for name in PREDICTORS:
        if entry := end.get(name):
            ratio = {"value": entry["ratio"], "stderr": entry["ratio_stderr"]}
            yield [f"{_with_error(end['start'])} -> {_with_error(end['end'])}", name, _with_error(ratio)]


def _placebo_rows(result: Result) -> Iterator[list[str]]:
    for part, table in result["placebo"].items():
        yield [part, *(with_interval(table[name], form=".3f") for name in ("raw", "left_over"))]


def _same_sample_rows(result: Result) -> Iterator[list[str]]:
    yield [_with_error(result["same_sample"][name]) for name in PREDICTORS[:3]]


def _rival_rows(result: Result) -> Iterator[list[str]]:
    for part, table in result["rivals"].items():
        yield [part, *(_with_error(table[name]) for name in ("linear", *RIVALS))]


def _with_error(entry: Numbers | None) -> str:
    return "-" if entry is None else f"{entry['value']:.3f} +- {entry['stderr']:.3f}"


def draw(paths: list[Path], results: list[Result], target: Path) -> None:
    """A row for each run: predicted against measured across halves, and the integral with the fresh entropies."""
    from trl_entropy.analysis import plots

    with saved_figure(target, (10, 3.6 * len(paths)), dpi=130) as figure:
        all_axes = figure.subplots(len(paths), 2, squeeze=False)
        for path, result, (left, right) in zip(paths, results, all_axes, strict=True):
            plots.plot_prediction(left, probed_rows(path), "second_order")
            left.set_title(f"{path.name}: predicted before the step, measured after")
            plots.plot_integral(right, result["integral"])
            right.set_title("Sum of predictions, and fresh completions")


def main(argv: list[str]) -> None:
    """Print the tables, and write `agreement.json` and `agreement.png` into the first run's report or `--output`."""
    parser = argparse.ArgumentParser(prog="trl-entropy experiment agreement", description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run directory; every step was probed")
    parser.add_argument("--output", type=Path, help="folder to write to (default: RUN/report of the first run)")
    parser.add_argument(
        "--fresh-completions",
        type=int,
        default=0,
        metavar="N",
        help="completions to draw from the first and from the last policy, to compare with the sum of all changes "
        "(default: 0, none)",
    )
    add_import_options(parser)
    options = parser.parse_args(argv)
    quiet_libraries()
    try:
        task = options.import_functions, options.trainer_factory
        results = [analyse(path, options.fresh_completions, *task) for path in options.runs]
    except ValueError as error:
        sys.exit(f"Error: {describe(error)}.")
    output = options.output or RunDirectory(options.runs[0]).report_path
    output.mkdir(parents=True, exist_ok=True)
    write_numbers(output / "agreement.json", results)
    draw(options.runs, results, output / "agreement.png")
    print(markdown(results))
    print(f"\n{output / 'agreement.json'}\n{output / 'agreement.png'}")
