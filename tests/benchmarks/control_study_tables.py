"""Tables and figure of the study of the task `trap` (`control_study.py`), by the analysis that was pre-registered."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from control_study import (
    COMPLETIONS,
    METHODS,
    SEEDS,
    TUNING_SEEDS,
    Run,
    at_completions,
    at_cost,
    chosen,
    key_of,
)
from measuring import interval as mean_interval

from trl_entropy.estimators.statistics.calibration import wilson_interval
from trl_entropy.experiments.output import saved_figure
from trl_entropy.runs.counted import counted

PAGES = {"The plan, written before": "trap", "What follows from it": "control"}
FOUND = 0.5  # pass@1 from which a run has found the better way
REFERENCES = ("lower learning rate", "learning rate with a schedule")
BySeed = dict[str, dict[int, Run]]


def fresh_runs(runs: dict[str, Run]) -> BySeed:
    """Method -> seed -> its run with the chosen setting; methods without a run are left out."""
    found = {}
    for method in METHODS:
        settings = chosen(method, runs)
        if settings is None:
            continue
        own = {seed: runs[key] for seed in SEEDS if (key := key_of(settings, seed)) in runs}
        found |= {method: own} if own else {}
    return found


def report(runs: dict[str, Run]) -> str:
    """All tables, as the page that the site shows."""
    fresh = fresh_runs(runs)
    costs = costs_of(fresh)
    parts = [
        "# The trap: tables of the study",
        _about(runs),
        "## Fresh seeds",
        outcomes(fresh, costs),
        "## Against a reference, paired by seed",
        *(against(fresh, costs, reference) for reference in ("none", *REFERENCES) if reference in fresh),
        "## Each seed: pass@1 after the last step",
        by_seed(fresh),
        "## Tuning",
        tuning(runs),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _about(runs: dict[str, Run]) -> str:
    source = (
        "Written by `python tests/benchmarks/control_study.py` from `docs/results/study/trap.jsonl`, which has a line "
        "for each run. " + " ".join(f"[{text}](../{page}.md)." for text, page in PAGES.items())
    )
    if not runs:
        return f"{source}\n\nNo run yet."
    dates, versions = (sorted({run[name] for run in runs.values()}) for name in ("date", "version"))
    return (
        f"{source}\n\n{counted(len(runs), 'run')}; made {' to '.join(dict.fromkeys((dates[0], dates[-1])))} "
        f"with the package as of {', '.join(versions)}; 2-core CPU container, one thread, other processes beside it. "
        "Brackets are 95 % intervals: Wilson's of shares, else Student's t over seeds."
    )


def costs_of(fresh: BySeed) -> dict[str, float]:
    """CPU time of a method for the same completions, over that without control: a ratio of medians over seeds."""
    spent = {
        name: [units_per_completion(run) for run in own.values() if run.get("unit")] for name, own in fresh.items()
    }
    known = {name: statistics.median(values) for name, values in spent.items() if values}
    return {name: value / known["none"] for name, value in known.items()} if "none" in known else {}


def units_per_completion(run: Run) -> float:
    """CPU seconds of training for each of its completions, in those that a pass of fixed size took at the time."""
    last = run["evaluations"][-1]
    return last["seconds"] / last["completions"] / run["unit"]


def outcomes(fresh: BySeed, costs: Mapping[str, float]) -> str:
    """Table: what each method ends at, after as many completions, and after as much CPU time, as without control."""
    lines = [
        "| method | setting | seeds that find the way | share | pass@1 | reward | entropy | CPU time | "
        "reward, equal CPU time | pass@1, equal CPU time |",
        "|---" * 10 + "|",
    ]
    for name, own in fresh.items():
        some, cost = list(own.values()), costs.get(name)
        hits = sum(found_the_way(run) for run in some)
        ends = [spread(at_completions(run, quantity) for run in some) for quantity in ("pass@1", "reward", "entropy")]
        at_equal = ["-", "-", "-"]
        if cost is not None:
            both = (spread(at_cost(run, quantity, cost) for run in some) for quantity in ("reward", "pass@1"))
            at_equal = [f"{cost:.2f}", *both]
        lines.append(
            f"| {name} | {setting(some[0]['settings'])} | {hits} of {len(some)} | {hits / len(some):.2f} "
            f"{_ends(*wilson_interval(hits, len(some)))} | {' | '.join(ends)} | {' | '.join(at_equal)} |"
        )
    return "\n".join(lines)


def found_the_way(run: Run) -> bool:
    return at_completions(run, "pass@1") >= FOUND


def against(fresh: BySeed, costs: Mapping[str, float], reference: str) -> str:
    """Table: differences from a reference on the seeds that both have; Holm's p over the methods that have all."""
    others = {name: own for name, own in fresh.items() if name not in ("none", reference)}
    rows, tested = [], {}
    for name, own in others.items():
        seeds = sorted(own.keys() & fresh[reference].keys())
        if len(seeds) < 2:
            continue
        pairs = [(own[seed], fresh[reference][seed]) for seed in seeds]
        differences = [at_completions(a, "pass@1") - at_completions(b, "pass@1") for a, b in pairs]
        only = [sum(found_the_way(a) > found_the_way(b) for a, b in two) for two in (pairs, _swapped(pairs))]
        known = name in costs and reference in costs
        equal_cost = [
            at_cost(a, "pass@1", costs[name]) - at_cost(b, "pass@1", costs[reference]) for a, b in pairs if known
        ]
        rewards = [at_completions(a, "reward") - at_completions(b, "reward") for a, b in pairs]
        tested[name] = sign_flip_p(differences)
        rows.append((name, len(seeds), only, differences, rewards, equal_cost))
    if not rows:
        return ""
    adjusted = holm({name: p for name, p in tested.items() if len(others[name]) == len(SEEDS)})
    lines = [
        f"| less {reference} | seeds | found by it alone, by the other alone | pass@1 | p | p, Holm | reward | "
        "pass@1, equal CPU time |",
        "|---" * 8 + "|",
    ]
    for name, number, only, differences, rewards, equal_cost in rows:
        corrected = f"{adjusted[name]:.3f}" if name in adjusted else "-"
        lines.append(
            f"| {name} | {number} | {only[0]}, {only[1]} | {spread(differences)} | {tested[name]:.3f} | {corrected} | "
            f"{spread(rewards)} | {spread(equal_cost) if equal_cost else '-'} |"
        )
    return "\n".join(lines)


def _swapped(pairs: Sequence[tuple[Run, Run]]) -> list[tuple[Run, Run]]:
    return [(b, a) for a, b in pairs]


def sign_flip_p(differences: Sequence[float]) -> float:
    """Two-sided p of a mean difference of 0: the share of all 2^n choices of signs with a mean at least as large."""
    values = np.array(differences)
    signs = np.array(list(itertools.product((-1.0, 1.0), repeat=len(values))))
    means = abs(signs @ values)
    return float((means >= abs(values.sum()) - 1e-12).mean())


def holm(ps: Mapping[str, float]) -> dict[str, float]:
    """Holm's adjusted p-values."""
    largest, adjusted = 0.0, {}
    for rank, name in enumerate(sorted(ps, key=lambda one: ps[one])):
        largest = max(largest, min(1.0, (len(ps) - rank) * ps[name]))
        adjusted[name] = largest
    return adjusted


def by_seed(fresh: BySeed) -> str:
    lines = [f"| method | {' | '.join(map(str, SEEDS))} |", "|---" * (len(SEEDS) + 1) + "|"]
    for name, own in fresh.items():
        ends = [f"{at_completions(own[seed], 'pass@1'):.2f}" if seed in own else "" for seed in SEEDS]
        lines.append(f"| {name} | {' | '.join(ends)} |")
    return "\n".join(lines)


def tuning(runs: dict[str, Run]) -> str:
    """Table: reward and pass@1 of each setting with each tuning seed; the chosen one is marked."""
    head = " | ".join(f"reward, pass@1: seed {seed}" for seed in TUNING_SEEDS)
    lines = [f"| method | setting | {head} | chosen |", "|---" * (3 + len(TUNING_SEEDS)) + "|"]
    for name, tried in METHODS.items():
        for settings in tried if len(tried) > 1 else ():
            own = [runs.get(key_of(settings, seed)) for seed in TUNING_SEEDS]
            cells = [f"{_last(run, 'reward')}, {_last(run, 'pass@1')}" if run else "" for run in own]
            if any(cells):
                mark = "yes" if settings == chosen(name, runs) else ""
                lines.append(f"| {name} | {setting(settings)} | {' | '.join(cells)} | {mark} |")
    return "\n".join(lines)


def _last(run: Run, quantity: str) -> str:
    return f"{at_completions(run, quantity):.2f}"


def setting(settings: Mapping[str, Any]) -> str:
    """The settings of a run that differ from those of no control."""
    return ", ".join(f"{name} {value}" for name, value in settings.items())


def spread(values: Iterable[float]) -> str:
    """Mean and 95 % interval (Student's t) over seeds."""
    values = list(values)
    if len(values) < 2:
        return f"{values[0]:.2f}"
    mean, low, high = mean_interval(values)
    return f"{mean:.2f} {_ends(low, high)}"


def _ends(low: float, high: float) -> str:
    return f"[{low:.2f}, {high:.2f}]"


def draw(runs: dict[str, Run], path: Path) -> None:
    """Left: training's entropy, mean over seeds. Middle: held-out reward. Right: pass@1 of each seed at the end."""
    from matplotlib import colormaps

    fresh = fresh_runs(runs)
    if not fresh:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    colors = dict(zip(METHODS, colormaps["tab10"].colors, strict=False))
    with saved_figure(path, (15, 4.5)) as figure:
        entropy, reward, ends = figure.subplots(1, 3)
        for name, own in fresh.items():
            for axes, curve in ((entropy, _training_entropy), (reward, _held_out_reward)):
                places, values = curve(next(iter(own.values())))[0], [curve(run)[1] for run in own.values()]
                axes.plot(places, np.mean(values, axis=0), color=colors[name], lw=1.3, label=f"{name} ({len(own)})")
        entropy.set(xlabel="completions of training", ylabel="entropy of training's completions, nats/token")
        reward.set(xlabel="completions of training", ylabel="held-out reward, mean over seeds")
        entropy.legend(fontsize=7, title="method (seeds)", title_fontsize=7)
        for place, (name, own) in enumerate(fresh.items()):
            values = [at_completions(run, "pass@1") for run in own.values()]
            jitter = np.linspace(-0.2, 0.2, len(values)) if len(values) > 1 else [0.0]
            ends.plot(place + np.array(jitter), values, "o", ms=4, color=colors[name])
        ends.axhline(FOUND, color="grey", lw=0.8, ls="--")
        ends.set(ylabel=f"held-out pass@1 after {COMPLETIONS:,} completions, each seed")
        ends.set_xticks(range(len(fresh)), list(fresh), rotation=30, ha="right", fontsize=7)


def _training_entropy(run: Run) -> tuple[list[float], list[float]]:
    each = run["evaluations"][-1]["completions"] / run["steps"]
    values = run["entropy/policy"]
    return [index * 5 * each for index in range(len(values))], values


def _held_out_reward(run: Run) -> tuple[list[float], list[float]]:
    return [one["completions"] for one in run["evaluations"]], [one["reward"] for one in run["evaluations"]]
