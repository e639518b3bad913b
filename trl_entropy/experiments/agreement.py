"""
Predicted against measured entropy change over a run: `trl-entropy experiment agreement RUN [RUN...]`.

Reads `metrics.jsonl` of runs in which every step was probed (configs/entropy-study.yaml); trains nothing. Prediction
is across halves: predicted on half a of each probe batch, measured on half b. With `--fresh-completions N` the sum of
all changes is compared with the entropy's fall on N completions of the first and N of the last policy.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from trl_entropy.estimators.statistics.estimate import Estimate
from trl_entropy.estimators.statistics.moments import PairMoments, jackknife
from trl_entropy.runs.console import quiet_libraries
from trl_entropy.runs.directory import RunDirectory
from trl_entropy.runs.strict_json import without_nan

PREDICTORS = ("linear", "second_order", "trapezoid", "measured")
RIVALS = ("cov_natural", "cov_policy_gradient")
Rows = list[dict[str, Any]]


def probed_rows(path: Path) -> Rows:
    """
    The probed steps of a run.

    Raises:
        ValueError: when there are fewer than 9, three for each third.
    """
    rows = [row for row in RunDirectory(path).metrics() if "entropy/half_a_measured" in row]
    if len(rows) < 9:
        raise ValueError(f"{path} has {len(rows)} probed steps; 9 or more are needed. Train with entropy_probe=True.")
    return rows


def thirds(rows: Rows) -> dict[str, Rows]:
    """All steps, and the first, second and last third of them."""
    cut = [round(len(rows) * i / 3) for i in range(4)]
    return {"all": rows, **{f"third {i + 1}": rows[cut[i] : cut[i + 1]] for i in range(3)}}


def cross_pairs(rows: Rows, predictor: str) -> list[PairMoments]:
    """One pair a step: predicted on half a, measured on half b; their errors are independent."""
    x, y = f"entropy/half_a_{predictor}", "entropy/half_b_measured"
    pairs = [(row[x], row[y], row[f"{x}_stderr"], row[f"{y}_stderr"]) for row in rows if x in row]
    return [PairMoments.empty().update(*pair) for pair in pairs]


def agreement(rows: Rows) -> dict[str, dict[str, Estimate]]:
    """Slope, corrected slope, correlation, R^2 and its ceiling of each predictor across halves, jackknife errors."""
    statistics: dict[str, Callable[[PairMoments], Estimate]] = {
        "slope": PairMoments.slope,
        "corrected_slope": PairMoments.corrected_slope,
        "correlation": PairMoments.correlation,
        "r_squared": PairMoments.r_squared,
        "ceiling_r_squared": PairMoments.ceiling_r_squared,
        "share_of_ceiling": PairMoments.share_of_ceiling,
    }
    table = {}
    for predictor in PREDICTORS:
        if pairs := cross_pairs(rows, predictor):
            table[predictor] = {name: jackknife(pairs, statistic) for name, statistic in statistics.items()}
    return table


def rival_correlations(rows: Rows) -> dict[str, Estimate]:
    """Correlation of the rivals (T11), and of the first order, with the change measured on the whole batch."""
    found = {}
    for name in (*RIVALS, "linear"):
        moments = PairMoments.empty()
        for row in rows:
            moments = moments.update(row[f"entropy/delta_{name}"], row["entropy/delta_measured"])
        found[name] = moments.correlation()
    return found


def placebo(rows: Rows) -> dict[str, Estimate] | None:
    """
    Slopes on the placebo's prediction, whose update is an earlier step's; None without a placebo.

    Returns:
        `raw`: of the measured change. Updates of one run share a direction and shrink together, so it need not be 0.
        `left_over`: of measured minus predicted by the step's own update, which must be 0: nothing but the step's own
        update tells its change.
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


def integrals(rows: Rows) -> dict[str, Any]:
    """
    The sum of predicted changes against the entropy of each step's fresh completions.

    Returns:
        `steps`, `fresh` with `fresh_stderr`, and per predictor the integral up to before each step, its standard
        error (changes and the start are on independent batches), and the largest deviation in standard errors.
    """
    fresh = [row["entropy/probe_batch"] for row in rows]
    errors = [row["entropy/probe_batch_stderr"] for row in rows]
    result: dict[str, Any] = {"steps": [row["step"] for row in rows], "fresh": fresh, "fresh_stderr": errors}
    for name in ("linear", "second_order", "trapezoid", "measured"):
        if f"entropy/delta_{name}" not in rows[0]:
            continue
        total, variance, values, stderrs, deviations = fresh[0], errors[0] ** 2, [fresh[0]], [errors[0]], []
        for before, row in itertools.pairwise(rows):
            total += before[f"entropy/delta_{name}"]
            variance += before[f"entropy/delta_{name}_stderr"] ** 2
            values.append(total)
            stderrs.append(math.sqrt(variance))
            combined = math.sqrt(variance + row["entropy/probe_batch_stderr"] ** 2)
            deviations.append((total - row["entropy/probe_batch"]) / combined)
        result[name] = {"values": values, "stderr": stderrs, "largest_deviation": max(deviations, key=abs)}
        result[name]["share_within_2_stderr"] = sum(abs(d) <= 2 for d in deviations) / len(deviations)
    return result


def end_point(rows: Rows, fall: tuple[Estimate, Estimate]) -> dict[str, Any]:
    """
    The sum of all steps' changes over the change between fresh completions of the first and of the last policy.

    Returns:
        `start`, `end` (nats per token, with errors), `change`, and per predictor the ratio with its standard error, to
        first order in both errors.
    """
    start, end = fall
    change, variance = end.value - start.value, start.stderr**2 + end.stderr**2
    result: dict[str, Any] = {"start": start.as_dict(), "end": end.as_dict(), "change": change}
    for name in PREDICTORS:
        if f"entropy/delta_{name}" in rows[0]:
            total = sum(row[f"entropy/delta_{name}"] for row in rows)
            total_variance = sum(row[f"entropy/delta_{name}_stderr"] ** 2 for row in rows)
            ratio = total / change
            stderr = math.sqrt(total_variance + ratio**2 * variance) / abs(change)
            result[name] = {"sum": total, "ratio": ratio, "ratio_stderr": stderr}
    return result


def analyse(path: Path, num_fresh: int = 0) -> dict[str, Any]:
    """Everything about one run, as plain data; with `num_fresh` its policies are loaded and sampled."""
    rows = probed_rows(path)
    last = rows[-1]
    fresh = {}
    if num_fresh:
        from trl_entropy.experiments.fresh_entropy import entropy_fall

        fresh = {"end_point": end_point(rows, entropy_fall(path, num_fresh))}
    return fresh | {
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


def _running(row: dict[str, Any], name: str) -> dict[str, float] | None:
    key = f"entropy/{name}"
    return {"value": row[key], "stderr": row[f"{key}_stderr"]} if key in row else None


def markdown(results: list[dict[str, Any]]) -> str:
    """The tables of docs/results.md; those of experiments that were not made are left out."""
    sections = {
        "run | steps | predictor | slope corrected for noise | correlation | R^2 | its ceiling | share of it": _across,
        "run | integral of | largest deviation, standard errors | steps within 2": _integral_rows,
        "run | fresh entropy | sum of | sum / change of the fresh": _end_point_rows,
        "run | steps | slope on the placebo | of what the prediction left over": _placebo_rows,
        "run | same sample, slope: first order | second order | trapezoid": _same_sample_rows,
        "run | steps | correlation: first order | -Cov(log pi, A) | -Cov(log pi, pi A)": _rival_rows,
    }
    tables = []
    for header, rows_of in sections.items():
        rows = [f"| {result['run']} | {' | '.join(row)} |" for result in results for row in rows_of(result)]
        if rows:
            tables.append("\n".join([f"| {header} |", "|---" * (header.count("|") + 1) + "|", *rows]))
    return "\n\n".join(tables)


def _across(result: dict[str, Any]) -> Iterator[list[str]]:
    for part, table in result["across_halves"].items():
        for predictor, values in table.items():
            cells = [f"{values[k]['value']:.3f}" for k in ("correlation", "r_squared", "ceiling_r_squared")]
            yield [
                part,
                predictor,
                _with_interval(values["corrected_slope"]),
                *cells,
                _with_error(values["share_of_ceiling"]),
            ]


def _integral_rows(result: dict[str, Any]) -> Iterator[list[str]]:
    for name in PREDICTORS:
        if entry := result["integral"].get(name):
            yield [name, f"{entry['largest_deviation']:+.2f}", f"{entry['share_within_2_stderr']:.0%}"]


def _end_point_rows(result: dict[str, Any]) -> Iterator[list[str]]:
    end = result.get("end_point", {})
    for name in PREDICTORS:
        if name in end:
            ratio = {"value": end[name]["ratio"], "stderr": end[name]["ratio_stderr"]}
            yield [f"{_with_error(end['start'])} -> {_with_error(end['end'])}", name, _with_error(ratio)]


def _placebo_rows(result: dict[str, Any]) -> Iterator[list[str]]:
    for part, table in result["placebo"].items():
        yield [part, *(_with_interval(table[name]) for name in ("raw", "left_over"))]


def _same_sample_rows(result: dict[str, Any]) -> Iterator[list[str]]:
    yield [_with_error(result["same_sample"][name]) for name in PREDICTORS[:3]]


def _rival_rows(result: dict[str, Any]) -> Iterator[list[str]]:
    for part, table in result["rivals"].items():
        yield [part, *(_with_error(table[name]) for name in ("linear", *RIVALS))]


def _with_error(entry: dict[str, float] | None) -> str:
    return "-" if entry is None else f"{entry['value']:.3f} +- {entry['stderr']:.3f}"


def _with_interval(entry: dict[str, float]) -> str:
    return f"{entry['value']:.3f} [{entry['low']:.3f}, {entry['high']:.3f}]"


def draw(paths: list[Path], results: list[dict[str, Any]], target: Path) -> None:
    """A row per run: predicted against measured across halves; the integral beside the fresh entropies."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from trl_entropy.analysis import plots

    figure, all_axes = plt.subplots(len(paths), 2, figsize=(10, 3.6 * len(paths)), layout="constrained", squeeze=False)
    for path, result, (left, right) in zip(paths, results, all_axes, strict=True):
        plots.plot_prediction(left, probed_rows(path), "second_order")
        left.set_title(f"{path.name}: predicted before the step, measured after")
        plots.plot_integral(right, result["integral"])
        right.set_title("Sum of predictions, and fresh completions")
    figure.savefig(target, dpi=130)
    plt.close(figure)


def main(argv: list[str]) -> None:
    """Tables on the console; `agreement.json` and `agreement.png` in the first run's report folder, or `--output`."""
    parser = argparse.ArgumentParser(prog="trl-entropy experiment agreement", description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run directory with every step probed")
    parser.add_argument("--output", type=Path, help="folder for agreement.json and agreement.png")
    parser.add_argument(
        "--fresh-completions", type=int, default=0, metavar="N", help="sample the first and the last policy; 0: do not"
    )
    options = parser.parse_args(argv)
    quiet_libraries()
    try:
        results = [analyse(path, options.fresh_completions) for path in options.runs]
    except ValueError as error:
        sys.exit(f"Error: {error}")
    output = options.output or RunDirectory(options.runs[0]).report_path
    output.mkdir(parents=True, exist_ok=True)
    (output / "agreement.json").write_text(json.dumps(without_nan(results), indent=1))
    draw(options.runs, results, output / "agreement.png")
    print(markdown(results))
    print(f"\n{output / 'agreement.json'}\n{output / 'agreement.png'}")
