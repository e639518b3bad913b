"""
Fisher kernels of single steps, their spectra, the noise scale, and how well the kernel predicts what a step does.

Reads the files that `fisher_probe` (and `noise_scale_probe`, if it was on) wrote into a run directory; trains nothing.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Literal, TypedDict

import torch

from trl_entropy.analysis.run import Run, load_run
from trl_entropy.estimators.kernel.score_change import change_agreement
from trl_entropy.estimators.statistics.estimate import Estimate
from trl_entropy.experiments.output import Numbers, saved_figure, thirds, with_interval, write_numbers
from trl_entropy.runs.console import quiet_libraries
from trl_entropy.runs.file_errors import describe

_KERNEL_KEYS = (
    "effective_rank", "participation_ratio", "cosine_same_prompt", "cosine_cross_prompt",
    "cosine_same_prompt_equal_reward", "cosine_same_prompt_unequal_reward", "cosine_prompt_difference_p_value",
    "length_correlation",
)  # fmt: skip


Group = Literal["numbers", "change_shares", "layers", "matrices"]
_LABELS: dict[Group, str] = {
    "numbers": "",
    "change_shares": "share of the predicted change: ",
    "layers": "share of the trace: layer ",
    "matrices": "share of the trace: ",
}


class Kernel(TypedDict):
    """One step's kernel: its slope and numbers, shares of the predicted change, shares of the trace."""

    slope: Numbers
    numbers: Numbers
    change_shares: Numbers
    layers: Numbers
    matrices: Numbers


class Result(TypedDict):
    """What `kernel.json` holds: slopes by part of the run, kernels by step, the noise scale at the end."""

    run: str
    slopes: dict[str, Numbers]
    kernels: dict[int, Kernel]
    noise_scale: Numbers


def analyse(run: Run, steps: list[int] | None) -> Result:
    """
    Slopes by part of the run, the kernels at `steps` (by default the first, middle and last), the noise scale.

    Raises:
        ValueError: if the run has no Fisher file, or none for one of the `steps`.
    """
    probed = run.probe_steps("fisher")
    if not probed:
        raise ValueError(f"{run.path} has no probes/fisher; train with fisher_probe=True and keep its files")
    steps = steps or sorted({probed[0], probed[len(probed) // 2], probed[-1]})
    if missing := [step for step in steps if step not in probed]:
        raise ValueError(f"{run.path} has no Fisher file of step {missing[0]}; there are {probed}")
    return {
        "run": str(run.path),
        "slopes": {name: pooled_slope(run, part) for name, part in thirds(probed).items()},
        "kernels": {step: _of_kernel(run, step) for step in steps},
        "noise_scale": _noise_scale(run),
    }


def pooled_slope(run: Run, steps: Iterable[int]) -> Numbers:
    """(T12): slope of measured on predicted changes over all completions of these steps, jackknife over prompts."""
    predicted, measured, prompts, num_prompts = [], [], [], 0
    for step in steps:
        arrays = run.probe_file("fisher", step)
        predicted.append(torch.from_numpy(arrays["logps_change_predicted"]))
        measured.append(torch.from_numpy(arrays["logps_change_measured"]))
        _, own = torch.from_numpy(arrays["prompt_index"]).unique(return_inverse=True)
        prompts.append(own + num_prompts)
        num_prompts += int(own.max()) + 1
    if not predicted:
        return {**Estimate(math.nan, math.nan, 0, 0).as_dict(), "correlation": math.nan, "rms": math.nan}
    slope, correlation = change_agreement(torch.cat(predicted), torch.cat(measured), torch.cat(prompts))
    rms = float(torch.cat(predicted).square().mean().sqrt())
    return {**slope.as_dict(), "correlation": correlation, "rms": rms}


def _of_kernel(run: Run, step: int) -> Kernel:
    row, shares = run.steps.loc[step], run.kernel_shares(step)
    return {
        "slope": pooled_slope(run, [step]),
        "numbers": {key: float(row.get(f"fisher/{key}", math.nan)) for key in _KERNEL_KEYS},
        "change_shares": {
            key.removeprefix("fisher/change_share_"): float(value)
            for key, value in row.items()
            if key.startswith("fisher/change_share_") and not key.endswith("_stderr")
        },
        "layers": {
            str(int(layer)): share for layer, share in shares.groupby("layer", observed=True)["share"].sum().items()
        },
        "matrices": shares.groupby("matrix", observed=True)["share"].sum().sort_values(ascending=False).to_dict(),
    }


def _noise_scale(run: Run) -> Numbers:
    """The noise scale over the whole run; empty if it was not measured."""
    rows = run.rows("noise_scale/simple")
    return {key: value for key, value in rows[-1].items() if key.startswith("noise_scale/")} if rows else {}


def table(result: Result) -> str:
    """The slopes and the kernels' numbers as markdown tables."""
    lines = ["| steps | slope [95 %] | correlation | rms of the change, nats |", "|---|---|---|---|"]
    slopes = result["slopes"] | {f"step {step}": entry["slope"] for step, entry in result["kernels"].items()}
    for name, slope in slopes.items():
        lines.append(
            f"| {name} | {with_interval(slope, form='.3f')} | {slope['correlation']:.4f} | {slope['rms']:.2e} |"
        )
    steps = list(result["kernels"])
    lines += ["", f"| kernel | {' | '.join(f'step {step}' for step in steps)} |", "|---" * (len(steps) + 1) + "|"]
    for group, label in _LABELS.items():
        for key in result["kernels"][steps[0]][group]:
            cells = (f"{result['kernels'][step][group].get(key, math.nan):.3g}" for step in steps)
            lines.append(f"| {label}{key.replace('_', ' ')} | {' | '.join(cells)} |")
    lines += [""] + [f"{key} {value:.4g}" for key, value in result["noise_scale"].items()]
    return "\n".join(lines)


def draw(run: Run, steps: list[int], target: Path) -> None:
    """Kernels above; below their spectra, the noise scale over training, and the slope of each step."""
    from trl_entropy.analysis import plots

    with saved_figure(target, (13, 8), dpi=110) as figure:
        above, below = figure.subfigures(2, 1, squeeze=False)[:, 0]
        for axes, step in zip(above.subplots(1, len(steps), squeeze=False)[0], steps, strict=True):
            plots.plot_kernel(axes, run.kernel(step)).set_title(f"Step {step}")
        spectra, noise, slope = below.subplots(1, 3)
        plots.plot_spectrum(spectra, {f"step {step}": run.kernel(step) for step in steps}).set_title("Spectrum")
        plots.plot_noise_scale(noise, run.rows("noise_scale/simple")).set_title("Noise scale, steps so far")
        plots.plot_change_slope(slope, run.rows("fisher/change_slope")).set_title("Change of log-probabilities")


def main(argv: list[str]) -> None:
    """Print the tables; write `kernel.json` and `kernel.png` into the run's report folder or `--output`."""
    parser = argparse.ArgumentParser(prog="trl-entropy experiment kernel", description=__doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="run directory of a run with fisher_probe=True")
    parser.add_argument(
        "--steps",
        type=int,
        nargs="+",
        metavar="STEP",
        help="steps whose kernels are shown (default: the first, the middle and the last probed step)",
    )
    parser.add_argument("--output", type=Path, help="folder for kernel.json and kernel.png (default: RUN/report)")
    options = parser.parse_args(argv)
    quiet_libraries()
    try:
        run = load_run(options.run)
        result = analyse(run, options.steps)
    except ValueError as error:
        sys.exit(f"Error: {describe(error)}.")
    output = options.output or run.path / "report"
    output.mkdir(parents=True, exist_ok=True)
    write_numbers(output / "kernel.json", result)
    draw(run, list(result["kernels"]), output / "kernel.png")
    print(f"{table(result)}\n\n{output / 'kernel.json'}\n{output / 'kernel.png'}")
