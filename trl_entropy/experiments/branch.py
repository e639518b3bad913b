"""
How many prompts should a step have? Short trainings from one checkpoint at several numbers of prompts.

    trl-entropy experiment branch --checkpoint RUN/checkpoint-N --prompts 4 8 16 32 64

Each branch goes on from the checkpoint, its optimizer's moments included, for some steps with another number of
prompts and a learning rate by the rule. What it gained in expected reward is measured by fresh completions of held-out
problems at both ends. The critical batch (T25) is fitted to the gains of a step, and stands beside the noise scale
that the `noise_scale_probe` finds at the same checkpoint (T14), (T16). Branches that are done stay on disk: a command
that was interrupted goes on, and one with more batch sizes, seeds or rules makes only those.

Why fresh completions: training's own reward is of the policies before each step, on as few prompts as the step has,
and the sum of the changes of (T21) has the errors of all steps (about 0.025 for ten steps of 16 prompts x 8
completions, more with fewer prompts), where 2,048 pairs of completions have about 0.01, at any number of prompts.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

import torch
from jaxtyping import Float
from torch import Tensor

from trl_entropy.estimators.noise.critical_batch import CriticalBatch, fit_at_best_rate, fit_critical_batch
from trl_entropy.estimators.statistics.estimate import Estimate
from trl_entropy.experiments.branch_training import (
    RULES,
    Branch,
    Branches,
    Plan,
    check_run,
    learning_rate_of,
    moments_of,
)
from trl_entropy.experiments.checkpoint import Checkpoint
from trl_entropy.experiments.command import check_memory, described
from trl_entropy.experiments.output import Numbers, add_import_options, saved_figure, with_interval, write_numbers
from trl_entropy.runs.console import quiet_libraries
from trl_entropy.runs.counted import counted
from trl_entropy.runs.directory import RunDirectory
from trl_entropy.runs.file_errors import check_writable, describe

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_VECTORS = 8  # of the model's parameters that are held at once: two models, a gradient, moments on disk and in use
# Options that are whole numbers: default, smallest value, help.
_NUMBERS = {
    "steps": (10, 1, "steps of each branch"),
    "num_seeds": (3, 1, "branches of each number of prompts; a single one gives no interval"),
    "num_completions": (2048, 64, "fresh completions at each end of a branch"),
    "noise_steps": (30, 0, "steps at learning rate 0 that measure the noise scale; 0: do not"),
    "seed": (0, 0, "of all draws; branches have the seeds that follow"),
}
_SCALES = {"simple": "(T14)", "adam": "(T16), in the optimizer's metric"}


class Row(TypedDict):
    """What branches of one number of prompts gained: means over seeds with t intervals, reward of a step."""

    rule: str
    num_prompts: int
    learning_rate: float
    gain: Numbers
    gain_per_1000_completions: Numbers
    training_reward: float


class Fit(TypedDict):
    """`critical_batch` of a learning rate's rule in prompts, and the largest gain of a step."""

    rule: str
    critical_batch: Numbers
    largest_gain: float


class Result(TypedDict):
    """What `branch.json` holds; gains in units of the reward, numbers of prompts in prompts."""

    learning_rate: float
    num_prompts_of_run: int
    num_generations: int
    num_steps: int
    num_seeds: int
    reward_at_start: Numbers
    rows: list[Row]
    fits: list[Fit]
    noise_scale: dict[str, Numbers]


def main(argv: list[str] | None = None) -> None:
    """Train what is not on disk yet, print the table, and write `branch.json` and `branch.png`."""
    options = _parser().parse_args(argv)
    quiet_libraries()
    try:
        _check_options(options)
        checkpoint = Checkpoint.read(options.checkpoint, options.import_functions, options.trainer_factory)
        check_run(checkpoint, options.prompts)
        check_memory(checkpoint, _VECTORS)
        plan = plan_of(checkpoint, options)
        output = options.output or checkpoint.path.parent / "experiments" / f"branch-{checkpoint.step}"
        check_writable(output)
        output.mkdir(parents=True, exist_ok=True)
        start = time.perf_counter()
        branches = Branches(checkpoint, output, plan)
    except ValueError as error:
        sys.exit(f"Error: {describe(error)}.")
    if checkpoint.warning:
        print(f"Warning: {checkpoint.warning}.", flush=True)
    print(cost_of(branches), flush=True)
    result = compute(branches, options.learning_rate_rule)
    numbers, picture = output / "branch.json", output / "branch.png"
    write_numbers(numbers, described(options, checkpoint, result, time.perf_counter() - start))
    with saved_figure(picture, (10, 4)) as figure:
        draw(result, *figure.subplots(1, 2))
    print(f"{table(result)}\n\nnumbers {numbers}\nfigure  {picture}")


def _parser() -> argparse.ArgumentParser:
    purpose = "How many prompts should a step have? Short trainings from one checkpoint at several numbers of prompts."
    parser = argparse.ArgumentParser(prog="trl-entropy experiment branch", description=purpose)
    parser.add_argument("--checkpoint", type=Path, required=True, help="RUN/checkpoint-N, with its optimizer.pt")
    parser.add_argument(
        "--prompts", type=int, nargs="+", default=[4, 8, 16, 32, 64], help="prompts of a step (default: 4 8 16 32 64)"
    )
    parser.add_argument(
        "--learning_rate_rule", "--learning-rate-rule", nargs="+", choices=tuple(RULES), default=["sqrt"],
        help="learning rate at k times the run's prompts: sqrt(k), k or 1 times that of the checkpoint. sqrt is the "
        "rule for Adam of arXiv:2205.10287, linear that of arXiv:1706.02677 for SGD. Several: a fit of each, and one "
        "over learning rates (default: sqrt)",
    )  # fmt: skip
    for name, (default, _, text) in _NUMBERS.items():
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(flag, f"--{name}", type=int, default=default, help=f"{text} (default: {default})")
    add_import_options(parser)
    parser.add_argument("--output", type=Path, help="folder to write to (default: RUN/experiments/branch-N)")
    return parser


def _check_options(options: argparse.Namespace) -> None:
    for name, (_, least, _) in _NUMBERS.items():
        if getattr(options, name) < least:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(options, name)}; use {least} or more")
    options.prompts = sorted(set(options.prompts))
    options.learning_rate_rule = list(dict.fromkeys(options.learning_rate_rule))
    if options.prompts[0] < 1 or len(options.prompts) < 2:
        given = " ".join(map(str, options.prompts))
        raise ValueError(
            f"--prompts is {given}; a critical batch needs two different numbers of prompts, of 1 or more"
        )


def plan_of(checkpoint: Checkpoint, options: argparse.Namespace) -> Plan:
    """The branches that the options ask for; those that two rules share stand once."""
    base = learning_rate_of(moments_of(checkpoint))
    found = {
        Branch(prompts, _rate(checkpoint, base, rule, prompts), seed): None
        for seed, rule, prompts in product(range(options.num_seeds), options.learning_rate_rule, options.prompts)
    }
    return Plan(tuple(found), options.steps, options.num_completions, options.noise_steps, options.seed)


def _rate(checkpoint: Checkpoint, base: float, rule: str, num_prompts: int) -> float:
    return base * RULES[rule](num_prompts / checkpoint.num_prompts_per_step)


def cost_of(branches: Branches) -> str:
    """What is still to be made, and how long that takes if a completion costs what it cost in the run's own steps."""
    plan, checkpoint, left = branches.plan, branches.checkpoint, branches.left()
    group = checkpoint.config["num_generations"]
    training = sum(branch.num_prompts for branch in left) * group * plan.num_steps
    training += plan.noise_steps * checkpoint.num_prompts_per_step * group
    fresh = plan.num_completions * (len(left) + len(plan.seeds))
    done = len(plan.branches) - len(left)
    text = (
        f"{counted(len(left), 'short training')} of {counted(plan.num_steps, 'step')} to make ({done} on disk): "
        f"{training:,} completions to train on, {fresh:,} to measure with"
    )
    times = [row["step_time"] for row in RunDirectory(checkpoint.path.parent).metrics() if row.get("step_time")]
    if not times:
        return f"{text}. The run has no step times, from which the time could be told."
    each = statistics.median(times) / (checkpoint.num_prompts_per_step * group)
    return (
        f"{text}. At the run's {1000 * each:.3g} ms a completion, about {(training + fresh) * each / 60:.1f} minutes."
    )


def compute(branches: Branches, rules: Sequence[str]) -> Result:
    """Train the branches, and fit the critical batch to what they gained."""
    plan, checkpoint = branches.plan, branches.checkpoint
    starts = {seed: branches.rewards_at_start(seed) for seed in plan.seeds}
    noise = branches.noise()
    made = dict(_each_trained(branches))
    base, group = learning_rate_of(branches.moments), checkpoint.config["num_generations"]
    gains = {branch: _mean(found["rewards"], starts[branch.seed]) / plan.num_steps for branch, found in made.items()}
    prompts = sorted({branch.num_prompts for branch in plan.branches})
    rows, fits = list[Row](), list[Fit]()
    for rule in rules:
        rates = [_rate(checkpoint, base, rule, number) for number in prompts]
        for number, rate in zip(prompts, rates, strict=True):
            cells = [Branch(number, rate, seed) for seed in plan.seeds]
            training = [value for cell in cells for value in made[cell]["training"]]
            rows.append(_row(rule, cells[0], [gains[cell] for cell in cells], group, training))
        table = _table_of(gains, list(zip(prompts, rates, strict=True)), plan.seeds)
        fits.append(_fit(rule, fit_critical_batch(table, torch.tensor(prompts, dtype=torch.float64))))
    if len(rules) > 1:
        pairs = sorted({(branch.num_prompts, branch.learning_rate) for branch in plan.branches})
        numbers, rates = (torch.tensor(column, dtype=torch.float64) for column in zip(*pairs, strict=True))
        fits.append(_fit("best", fit_at_best_rate(_table_of(gains, pairs, plan.seeds), numbers, rates / base)))
    return {
        "learning_rate": base,
        "num_prompts_of_run": checkpoint.num_prompts_per_step,
        "num_generations": group,
        "num_steps": plan.num_steps,
        "num_seeds": len(plan.seeds),
        "reward_at_start": _over_seeds([_mean(rewards) for rewards in starts.values()]).as_dict(),
        "rows": rows,
        "fits": fits,
        "noise_scale": {name: _noise(noise, name) for name in _SCALES if f"noise_scale/{name}" in noise},
    }


def _each_trained(branches: Branches) -> Iterator[tuple[Branch, dict[str, Any]]]:
    """All branches with what was found, and a line for each that had to be trained."""
    left = set(branches.left())
    for number, branch in enumerate(branches.plan.branches, 1):
        found = branches.trained(branch)
        if branch in left:
            print(
                f"{number}/{len(branches.plan.branches)}: {counted(branch.num_prompts, 'prompt')} a step, learning "
                f"rate {branch.learning_rate:.3g}, seed {branch.seed}: {found['seconds']:.0f} s",
                flush=True,
            )
        yield branch, found


def _mean(rewards: Sequence[float | None], less: Sequence[float | None] | None = None) -> float:
    """The mean reward, or that of the differences from those of the same problems; of completions that have one."""
    pairs = zip(rewards, [0.0] * len(rewards) if less is None else less, strict=True)
    return statistics.fmean([a - b for a, b in pairs if a is not None and b is not None] or [math.nan])


def _table_of(
    gains: dict[Branch, float], cells: Sequence[tuple[int, float]], seeds: Sequence[int]
) -> Float[Tensor, "S C"]:
    return torch.tensor([[gains[Branch(*cell, seed)] for cell in cells] for seed in seeds], dtype=torch.float64)


def _over_seeds(values: Sequence[float]) -> Estimate:
    number = len(values)
    error = statistics.stdev(values) / math.sqrt(number) if number > 1 else math.nan
    return Estimate(statistics.fmean(values), error, float(number - 1), number)


def _row(rule: str, branch: Branch, gains: Sequence[float], group: int, training: Sequence[float]) -> Row:
    per_1000 = [1000 * gain / (branch.num_prompts * group) for gain in gains]
    return {
        "rule": rule,
        "num_prompts": branch.num_prompts,
        "learning_rate": branch.learning_rate,
        "gain": _over_seeds(gains).as_dict(),
        "gain_per_1000_completions": _over_seeds(per_1000).as_dict(),
        "training_reward": statistics.fmean(training) if training else math.nan,
    }


def _fit(rule: str, found: CriticalBatch) -> Fit:
    batch = {"value": found.value, "low": found.low, "high": found.high}
    return {"rule": rule, "critical_batch": batch, "largest_gain": found.largest_gain}


def _noise(noise: dict[str, Any], name: str) -> Numbers:
    keys = {"value": name, "low": f"{name}_lower", "high": f"{name}_upper"}
    return {end: noise[f"noise_scale/{key}"] for end, key in keys.items()}


def table(result: Result) -> str:
    """The result as text: gains in 1e-3 of reward."""
    lines = [
        "",
        "| rule | prompts | learning rate | gain of a step, 1e-3 | gain of 1,000 completions, 1e-3 |",
        "|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        cells = (with_interval(row[name], 1e3, ".3g") for name in ("gain", "gain_per_1000_completions"))
        lines.append(f"| {row['rule']} | {row['num_prompts']} | {row['learning_rate']:.3g} | {' | '.join(cells)} |")
    steps, seeds = counted(result["num_steps"], "step"), counted(result["num_seeds"], "seed")
    lines.append(f"\n{steps} of each of {seeds}; 95 % intervals over seeds (Student's t)")
    for fit in result["fits"]:
        rule = "at the best learning rate of each" if fit["rule"] == "best" else f"by the rule {fit['rule']}"
        lines.append(f"critical batch {rule}: {_prompts(fit['critical_batch'])}")
    for name, found in result["noise_scale"].items():
        lines.append(f"noise scale {_SCALES[name]}: {_prompts(found)}")
    return "\n".join(lines)


def _prompts(found: Numbers) -> str:
    if math.isnan(found["value"]):
        return "none can be fitted: the reward did not rise, or there are too few learning rates"
    if math.isnan(found["low"]):
        return f"{found['value']:.3g} prompts fit best, without an interval: a single seed, or the form does not hold"
    return f"{with_interval(found, form='.3g')} prompts"


def draw(result: Result, left: Axes, right: Axes) -> None:
    """Left: the gain of a step against its prompts, with the fits. Right: the gain of 1,000 completions."""
    from trl_entropy.analysis.plots import BLUE, GREEN, GREY, ORANGE

    colors = dict(zip(RULES, (BLUE, ORANGE, GREEN), strict=True))
    for fit in result["fits"]:
        rows = [row for row in result["rows"] if row["rule"] == fit["rule"]]
        if not rows:
            continue
        prompts, color = [row["num_prompts"] for row in rows], colors[fit["rule"]]
        for axes, name in ((left, "gain"), (right, "gain_per_1000_completions")):
            values = [1e3 * row[name]["value"] for row in rows]  # type: ignore[literal-required]
            ends = [1e3 * (row[name]["high"] - row[name]["value"]) for row in rows]  # type: ignore[literal-required]
            axes.errorbar(prompts, values, ends, fmt="o", ms=4, color=color, capsize=2, label=fit["rule"])
        batch = CriticalBatch(**fit["critical_batch"], largest_gain=fit["largest_gain"])
        if math.isfinite(batch.value):
            left.plot(prompts, [1e3 * batch.gain(number) for number in prompts], color=color, lw=1)
    simple = result["noise_scale"].get("simple")
    for axes, what in ((left, "a step"), (right, "1,000 completions")):
        axes.set(xscale="log", xlabel="prompts of a step", ylabel=f"gain of {what}, 1e-3 of reward, 95 %")
        axes.axhline(0, color=GREY, lw=0.8)
        axes.set_xticks(sorted({row["num_prompts"] for row in result["rows"]}))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.minorticks_off()
    if simple is not None and math.isfinite(simple["value"]):
        left.axvline(simple["value"], color=GREY, ls=":", label="noise scale (T14)")
    left.legend(frameon=False)
