"""
Do published claims hold here? `trl-entropy experiment claims --runs FOLDER [--train]`

Each claim is measured on runs of the quickstart that differ in the seed, and holds, fails, or cannot be told: its
interval must lie where the claim puts it, or where it does not. `--list` shows what each claim says and what would
refute it. `--train` trains the runs that FOLDER lacks, one after the other; stopped and started again it goes on with
the next run.
"""

from __future__ import annotations

import argparse
import math
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypedDict

from trl_entropy.analysis.run import Run
from trl_entropy.experiments.claims.claim import Claim, Expected, Finding
from trl_entropy.experiments.claims.families import FAMILIES, Family, shortened
from trl_entropy.experiments.claims.listed import CLAIMS
from trl_entropy.experiments.output import Numbers, saved_figure, with_interval, write_numbers
from trl_entropy.runs.console import quiet_libraries
from trl_entropy.runs.counted import counted
from trl_entropy.runs.file_errors import check_writable, describe

_NOT_MEASURED = "not measured"
_COLOURS = {"holds": "C2", "fails": "C3", "cannot tell here": "0.5"}


class Part(TypedDict):
    """A number of a claim: what it is, the estimate, where the claim puts it, and its own verdict if it decides."""

    what: str
    estimate: Numbers
    num_samples: int
    above: float
    below: float
    verdict: str | None


class Judged(TypedDict):
    """A claim in `claims.json`."""

    source: str
    statement: str
    refuted_by: str
    caveat: str
    verdict: str
    runs: dict[str, list[str]]
    numbers: dict[str, Part]


def main(argv: list[str]) -> None:
    """Print the claims and their verdicts; write `claims.json` and `claims.png` into `--output`."""
    options = _parser().parse_args(argv)
    quiet_libraries()
    chosen = [CLAIMS[name] for name in options.claim or CLAIMS]
    families = FAMILIES if options.steps is None else shortened(FAMILIES, options.steps)
    if options.list:
        print("\n\n".join(described(claim, families) for claim in chosen))
        return
    if options.runs is None:
        sys.exit("Error: name the folder of the runs, --runs FOLDER; --list needs none.")
    try:
        output = options.output or options.runs
        check_writable(output)
        if options.train:
            train_missing(chosen, families, options.runs)
        result = {claim.name: judged(claim, families, options.runs) for claim in chosen}
    except ValueError as error:
        sys.exit(f"Error: {describe(error)}.")
    write_numbers(output / "claims.json", result)
    draw(result, output / "claims.png")
    print(markdown(result))
    if missing := missing_runs(chosen, families, options.runs):
        minutes = sum(families[family].minutes for family, _ in missing)
        print(f"\n{counted(len(missing), 'run')} of these claims not trained yet, about {minutes:.0f} CPU minutes:")
        short = "" if options.steps is None else f" --steps {options.steps}"
        print(f"  trl-entropy experiment claims --runs {shlex.quote(str(options.runs))}{short} --train")
    print(f"\n{output / 'claims.json'}\n{output / 'claims.png'}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="trl-entropy experiment claims",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--list", action="store_true", help="say what is claimed and what would refute it, and end")
    parser.add_argument("--runs", type=Path, metavar="FOLDER", help="where the runs are, or are to be trained")
    parser.add_argument("--train", action="store_true", help="train the runs that are missing first")
    parser.add_argument(
        "--steps", type=_steps, metavar="N", help="runs of N steps, where a family has more: a first look"
    )
    parser.add_argument("--claim", nargs="+", choices=list(CLAIMS), metavar="NAME", help="these claims only")
    parser.add_argument("--output", type=Path, help="folder to write to (default: that of the runs)")
    return parser


def _steps(word: str) -> int:
    """Raises `ArgumentTypeError` below 12 steps, of which each third has a kernel."""
    if not word.isdecimal() or int(word) < 12:
        raise argparse.ArgumentTypeError(f"{word} is not a number of steps from 12 on")
    return int(word)


def described(claim: Claim, families: Mapping[str, Family]) -> str:
    """A claim in full, with the commands that train its runs."""
    lines = [
        f"{claim.name}  ({claim.source})",
        f"  claimed:     {claim.statement}",
        f"  refuted by:  {claim.refuted_by}",
    ]
    lines += [f"  measured:    {one.what}{_where(one)}" for one in claim.expected.values()]
    lines += [f"  cannot show: {claim.caveat}"] if claim.caveat else []
    for name in claim.families:
        family = families[name]
        seeds = ", ".join(map(str, family.seeds))
        lines.append(
            f"  runs:        {name}: {family.purpose}; seeds {seeds}, about {family.minutes:g} CPU minutes each"
        )
        words = family.commands(family.seeds[0], Path("FOLDER") / f"{name}-seed{family.seeds[0]}")
        lines += [f"    trl-entropy {shlex.join(one)}" for one in words]
    return "\n".join(lines)


def _where(expected: Expected) -> str:
    """The bounds in words, with a comma before them; empty if there are none."""
    words = [f"above {expected.above:g}"] if math.isfinite(expected.above) else []
    words += [f"below {expected.below:g}"] if math.isfinite(expected.below) else []
    return f", {' and '.join(words)}" if words else ""


def missing_runs(claims: Sequence[Claim], families: Mapping[str, Family], folder: Path) -> list[tuple[str, int]]:
    """The families and seeds that these claims need and `folder` lacks."""
    needed = dict.fromkeys(
        (name, seed) for claim in claims for name in claim.families for seed in families[name].seeds
    )
    return [(name, seed) for name, seed in needed if families[name].run(seed, folder) is None]


def train_missing(claims: Sequence[Claim], families: Mapping[str, Family], folder: Path) -> None:
    """Train them, one after the other."""
    missing = missing_runs(claims, families, folder)
    for number, (name, seed) in enumerate(missing, start=1):
        print(f"run {number} of {len(missing)}: {name}, seed {seed}", flush=True)
        families[name].train(seed, folder)


def runs_of(claim: Claim, families: Mapping[str, Family], folder: Path) -> dict[str, list[Run]]:
    """The finished runs that a claim reads, by family, each family in the order of the seeds."""
    found = {name: [families[name].run(seed, folder) for seed in families[name].seeds] for name in claim.families}
    return {name: [run for run in runs if run is not None] for name, runs in found.items()}


def judged(claim: Claim, families: Mapping[str, Family], folder: Path) -> Judged:
    """The claim's verdict on the runs that `folder` has; not measured unless it has all of them."""
    runs = runs_of(claim, families, folder)
    complete = all(len(runs[name]) == len(families[name].seeds) for name in claim.families)
    finding = claim.judge(runs) if complete else None
    return {
        "source": claim.source,
        "statement": claim.statement,
        "refuted_by": claim.refuted_by,
        "caveat": claim.caveat,
        "verdict": _NOT_MEASURED if finding is None else finding.verdict,
        "runs": {name: [run.path.name for run in some] for name, some in runs.items()},
        "numbers": {} if finding is None else _parts(finding),
    }


def _parts(finding: Finding) -> dict[str, Part]:
    parts: dict[str, Part] = {}
    for name, expected in finding.claim.expected.items():
        if name not in finding.numbers:
            continue
        estimate = finding.numbers[name]
        parts[name] = {
            "what": expected.what,
            "estimate": estimate.as_dict(),
            "num_samples": estimate.num_samples,
            "above": expected.above,
            "below": expected.below,
            "verdict": expected.verdict(*estimate.interval()) if expected.decides else None,
        }
    return parts


def markdown(result: Mapping[str, Judged]) -> str:
    """The table of verdicts: a row for each number."""
    lines = ["| claim | source | verdict | number | measured | claimed |", "|---|---|---|---|---|---|"]
    for name, one in result.items():
        first = f"| {name} | {one['source']} | **{one['verdict']}** |"
        if not one["numbers"]:
            lines.append(f"{first} | | |")
        for place, part in enumerate(one["numbers"].values()):
            claimed = _where(Expected("", part["above"], part["below"])).removeprefix(", ")
            start, estimate = first if place == 0 else "| | | |", part["estimate"]
            told = "too few to tell" if math.isnan(estimate["value"]) else with_interval(estimate, form=".3g")
            lines.append(f"{start} {part['what']} | {told} | {claimed} |")
    return "\n".join(lines)


def draw(result: Mapping[str, Judged], target: Path) -> None:
    """Every number that decides, with its interval and the values that the claim puts it at; a panel for each."""
    shown = [
        (name, part) for name, one in result.items() for part in one["numbers"].values() if part["verdict"] is not None
    ]
    with saved_figure(target, (9, 0.62 * max(1, len(shown)) + 0.6)) as figure:
        for axes, (name, part) in zip(
            figure.subplots(max(1, len(shown)), 1, squeeze=False)[:, 0], shown, strict=False
        ):
            estimate, colour = part["estimate"], _COLOURS[str(part["verdict"])]
            values = [estimate[key] for key in ("low", "value", "high") if math.isfinite(estimate[key])]
            bounds = [part[key] for key in ("above", "below") if math.isfinite(part[key])]  # type: ignore[literal-required]
            ends = [*values, *bounds]
            width = (max(ends) - min(ends)) or 1.0
            left, right = min(ends) - 0.3 * width, max(ends) + 0.3 * width
            axes.axvspan(max(left, part["above"]), min(right, part["below"]), color="C2", alpha=0.15, lw=0)
            axes.plot([estimate["low"], estimate["high"]], [0, 0], color=colour)
            axes.plot(estimate["value"], 0, "o", color=colour)
            axes.set(xlim=(left, right), yticks=[], ylim=(-1, 1))
            axes.tick_params(labelsize=7)
            axes.set_title(f"{name}: {part['what']}: {part['verdict']}", fontsize=7, loc="left", pad=2)
