"""
What does it cost in reward to keep entropy? Steps by several methods of entropy control from one fixed state.

    trl-entropy experiment exchange --checkpoint RUN/checkpoint-N
    trl-entropy experiment exchange RUN [RUN...]    # of the steps that a run made, see `exchange_of_runs`

For each redraw of the rollouts every method makes a step with the run's AdamW, from the same moments and rollouts: no
control, a lower learning rate, TRL's entropy bonus, Clip-Cov, as many random tokens, as many of the largest covariance
or entropy loss (`attribution`), and the entropy control (T19).
For each step the changes of the entropy and of the expected reward (T20) are computed to first order on one large set
of held-out completions; for some redraws and methods the true changes are measured too. KL-Cov is not among the
methods, since with one update per generation it does nothing.

A change of the gradient enters a step with the weight 1 - b1, and later steps through the momentum. The changes that
the bonus and the token methods make in one step, compared with no control, are therefore about a tenth of what they
become in the end. Their exchange is a ratio, which this does not affect.
"""

from __future__ import annotations

import argparse
import math
import sys
import zlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, TypedDict

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from trl_entropy.estimators.control.exchange import ExchangeRecord, mean_over_redraws, ratio_over_blocks
from trl_entropy.experiments import exchange_of_runs
from trl_entropy.experiments.checkpoint import Checkpoint
from trl_entropy.experiments.command import VECTORS_OF_STATE, Command
from trl_entropy.experiments.exchange_changes import GROUP_SIZE, NUM_BLOCKS, LargeSet, true_changes
from trl_entropy.experiments.exchange_steps import MEASURED, METHODS, steps_of_methods
from trl_entropy.experiments.output import Numbers, with_interval
from trl_entropy.experiments.redraws import Cache, in_chunks
from trl_entropy.experiments.state import FixedState
from trl_entropy.rollouts.batch import RolloutBatch
from trl_entropy.rollouts.completions import Completions
from trl_entropy.tasks.registry import task_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_REDRAWS = 6  # second part of a seed
_REDRAWS_PER_CHUNK = 4
_QUANTITIES = ("entropy", "reward")
_NOTES = ("departure", "num_tokens", "infeasible")

Change = Literal[
    "entropy", "reward", "reward_per_entropy", "entropy_difference", "reward_difference", "exchange"
]  # fmt: skip
# What the tables show of a step, with the factor by which it is multiplied.
_SHOWN: dict[Change, float] = {
    "entropy": 1e3, "reward": 1e3, "reward_per_entropy": 1, "entropy_difference": 1e3, "reward_difference": 1e3,
    "exchange": 1,
}  # fmt: skip


class Changes(TypedDict):
    """Changes by a method's step, `_difference` from those of no control, and the ratios of (T20); with errors."""

    method: str
    entropy: Numbers
    reward: Numbers
    entropy_difference: Numbers
    reward_difference: Numbers
    reward_per_entropy: Numbers
    exchange: Numbers


class FirstOrderRow(Changes):
    """Changes to first order, means over redraws, and what `MadeStep` says of the step."""

    departure: float
    num_tokens: float
    infeasible: float
    stderr_of_redraws: Numbers


class TrueRow(Changes):
    """True changes, and `_correction`: how much they differ from first order."""

    entropy_correction: Numbers
    reward_correction: Numbers


class Result(TypedDict):
    """What `exchange.json` holds; entropy in nats per token."""

    policy_entropy: float
    mean_reward: float
    learning_rate: float
    num_redraws: int
    num_measured: int
    rows: list[FirstOrderRow]
    true_rows: list[TrueRow]


def check(checkpoint: Checkpoint, options: argparse.Namespace) -> None:
    """Raises `ValueError` if the options ask for more than the run can give."""
    if options.num_completions % (NUM_BLOCKS * GROUP_SIZE):
        raise ValueError(
            f"--num-completions is {options.num_completions}; use a multiple of {NUM_BLOCKS * GROUP_SIZE}"
        )
    num_problems, num_prompts = task_of(checkpoint.task).num_problems(checkpoint.task), checkpoint.num_prompts_per_step
    if num_problems < num_prompts + options.num_probe:
        raise ValueError(
            f"the run has {num_problems} problems, a redraw takes {num_prompts} of them and --num-probe "
            f"{options.num_probe} others; lower --num-probe"
        )


def redraws(
    state: FixedState, cache: Cache, large: LargeSet, options: argparse.Namespace
) -> Float[Tensor, "R M columns"]:
    """
    Redraws of the rollouts, and what each method's step from each of them does.

    Returns:
        Columns: `LargeSet.products` with the K blocks, for entropy and reward; the numbers `_NOTES` of the step;
        `LargeSet.moved` by block, nan where true changes are not measured.
    """
    num_groups, num_probe = len(state.rollouts.prompt_index.unique()), options.num_probe

    def chunk(index: int) -> Tensor:
        seeds = (options.seed, _REDRAWS, index)
        problems = np.stack([
            np.random.default_rng((*seeds, n)).permutation(state.num_problems)[: num_groups + num_probe]
            for n in range(_REDRAWS_PER_CHUNK)
        ])  # fmt: skip
        batch = state.draw_rollouts(problems[:, :num_groups].flatten(), state.args.num_generations, seeds)
        probes = state.draw(problems[:, num_groups:].flatten(), seeds)
        rollouts = RolloutBatch.from_micro_batches([batch])
        rows = torch.arange(len(rollouts.rewards)).view(_REDRAWS_PER_CHUNK, -1)
        found = []
        for n in range(_REDRAWS_PER_CHUNK):
            number = index * _REDRAWS_PER_CHUNK + n
            own = rollouts.rows(rows[n])
            probe = probes.rows(torch.arange(n * num_probe, (n + 1) * num_probe))
            found.append(of_redraw(state, large, own, probe, options, number))
        return torch.stack(found)

    methods = zlib.crc32(repr((METHODS, MEASURED)).encode())
    name = f"exchange-{options.num_completions}-{num_probe}-{options.num_measured}-{methods:08x}"
    return in_chunks(cache, name, options.num_redraws, _REDRAWS_PER_CHUNK, chunk)


def of_redraw(
    state: FixedState,
    large: LargeSet,
    rollouts: RolloutBatch,
    probe: Completions,
    options: argparse.Namespace,
    number: int,
) -> Float[Tensor, "M columns"]:
    """The columns of one redraw."""
    made = steps_of_methods(state, rollouts, probe, options.seed + number, options.batch_size)
    notes = [[float(getattr(step, name)) for name in _NOTES] for step in made.values()]
    moved = torch.full((len(made), 3 * NUM_BLOCKS), math.nan, dtype=torch.float64)
    for method in MEASURED if number < options.num_measured else ():
        moved[METHODS.index(method)] = large.moved(made[method].update).flatten()
    products = large.products(step.update for step in made.values())
    return torch.cat([products.flatten(1), torch.tensor(notes, dtype=torch.float64), moved], dim=1)


def first_order(
    columns: Float[Tensor, "R M columns"], summary: Float[Tensor, "3 K"], num_completions: int
) -> tuple[Float[Tensor, "R N"], Float[Tensor, "K N"]]:
    """First-order entropy changes of all methods, then reward changes, of each redraw; and the blocks' influence."""
    num_methods = columns.shape[1]
    products = columns[:, :, : 2 * NUM_BLOCKS].unflatten(2, (2, NUM_BLOCKS)).permute(0, 3, 2, 1).flatten(2)
    completions = torch.full_like(summary[1], num_completions / NUM_BLOCKS)
    sizes = torch.stack([summary[1], completions], dim=1).repeat_interleave(num_methods, dim=1)
    mean = ratio_over_blocks(products.mean(0), sizes)
    return products.sum(1) / sizes.sum(0), mean.influence


def measured(
    columns: Float[Tensor, "R M columns"], summary: Float[Tensor, "3 K"], num_completions: int
) -> tuple[Float[Tensor, "R N"], Float[Tensor, "K N"]]:
    """The true changes, in the form of [`first_order`]."""
    values, influence = [], []
    for redraw in columns[:, :, -3 * NUM_BLOCKS :].unflatten(2, (3, NUM_BLOCKS)):
        changes = [true_changes(summary, moved, num_completions) for moved in redraw]
        in_order = [change[quantity] for quantity in (0, 1) for change in changes]
        values.append(torch.stack([change.value for change in in_order]))
        influence.append(torch.stack([change.influence for change in in_order], dim=1))
    return torch.stack(values), torch.stack(influence).mean(0)


def compute(state: FixedState, cache: Cache, options: argparse.Namespace) -> Result:
    """Draw the large set and the redraws, and estimate what each method's step changes."""
    number = options.num_completions
    large = LargeSet(state, number, options.seed, options.batch_size)
    columns = redraws(state, cache, large, options)
    summary = cache.get(f"exchange-summary-{number}", lambda: large.summary)
    predicted = first_order(columns, summary, number)
    record = ExchangeRecord.of(METHODS, mean_over_redraws(*predicted))
    of_redraws = predicted[0].std(0) / math.sqrt(len(columns))
    notes = columns[:, :, 2 * NUM_BLOCKS :][:, :, : len(_NOTES)].mean(0)
    rows: list[FirstOrderRow] = []
    for m, method in enumerate(METHODS):
        departure, num_tokens, infeasible = notes[m].tolist()
        rows.append({
            **_changes(record, method), "departure": departure, "num_tokens": num_tokens, "infeasible": infeasible,
            "stderr_of_redraws": dict(zip(_QUANTITIES, of_redraws[m :: len(METHODS)].tolist(), strict=True)),
        })  # fmt: skip
    entropy, tokens, rewards = summary.sum(1).tolist()
    return {
        "policy_entropy": entropy / tokens,
        "mean_reward": rewards / number,
        "learning_rate": max(state.context.learning_rate.values()),
        "num_redraws": len(columns),
        "num_measured": options.num_measured,
        "rows": rows,
        "true_rows": true_rows(columns, options.num_measured, summary, number),
    }


def true_rows(
    columns: Float[Tensor, "R M columns"], num_measured: int, summary: Float[Tensor, "3 K"], num_completions: int
) -> list[TrueRow]:
    """True changes of some methods: first order over all redraws, plus what it leaves out, measured on some."""
    some = columns[:, [METHODS.index(method) for method in MEASURED]]
    values, influence = first_order(some, summary, num_completions)
    same, true = (f(some[:num_measured], summary, num_completions) for f in (first_order, measured))
    corrections, of_blocks = (b - a for a, b in zip(same, true, strict=True))
    record = ExchangeRecord.of(MEASURED, mean_over_redraws(values, influence + of_blocks, corrections))
    errors = ExchangeRecord.of(MEASURED, mean_over_redraws(corrections, of_blocks))
    return [
        {
            **_changes(record, method),
            "entropy_correction": errors.change("entropy", method).as_dict(),
            "reward_correction": errors.change("reward", method).as_dict(),
        }
        for method in MEASURED
    ]


def _changes(record: ExchangeRecord, method: str) -> Changes:
    """The changes by a method's step, alone and against those of no control."""
    return {
        "method": method,
        "entropy": record.change("entropy", method).as_dict(),
        "reward": record.change("reward", method).as_dict(),
        "entropy_difference": record.difference("entropy", method).as_dict(),
        "reward_difference": record.difference("reward", method).as_dict(),
        "reward_per_entropy": record.reward_per_entropy(method),
        "exchange": record.exchange(method),
    }


def table(result: Result) -> str:
    """The result as text, with changes in units of 1e-3 nats per token and 1e-3 of reward."""

    def cells(row: Changes) -> str:
        found = [with_interval(row[name], scale) for name, scale in _SHOWN.items()]
        return " | ".join(found if row["method"] != METHODS[0] else [*found[:3], "-", "-", "-"])

    head = "entropy | reward | reward / entropy | entropy - none | reward - none | exchange"
    lines = [f"| method | {head} | departure | tokens | capped |", "|---" * 10 + "|"]
    for row in result["rows"]:
        notes = f"{row['departure']:.3f} | {row['num_tokens']:.0f} | {row['infeasible']:.0%}"
        lines.append(f"| {row['method']} | {cells(row)} | {notes} |")
    lines += [f"\nfirst order, mean over {result['num_redraws']} redraws\n"]
    lines += [f"| method | {head} | entropy beyond first order | reward beyond |", "|---" * 9 + "|"]
    for true in result["true_rows"]:
        beyond = [with_interval(entry, 1e3) for entry in (true["entropy_correction"], true["reward_correction"])]
        lines.append(f"| {true['method']} | {cells(true)} | {' | '.join(beyond)} |")
    return "\n".join([
        *lines,
        f"\ntrue change: first order, plus what it leaves out, measured on {result['num_measured']} redraws",
        "changes in 1e-3 nats/token and 1e-3 of reward, ratios in reward per nat/token; 95 % intervals over redraws "
        "and the large set",
        f"policy entropy {result['policy_entropy']:.4f} nats/token, mean reward {result['mean_reward']:.3f}",
    ])  # fmt: skip


def draw(result: Result, left: Axes, right: Axes) -> None:
    """Left: reward change against entropy change. Right: exchanges with a bounded interval. Hollow: true changes."""
    from trl_entropy.analysis.plots import BLUE, GREEN, GREY, ORANGE

    families = {"none": "black", "lower_lr": GREY, "bonus": ORANGE, "entropy_control": BLUE}
    places = {method: y for y, method in enumerate(METHODS[1:])}

    def point(axes: Axes, x: Numbers, y: float, y_error: float | None, scale: float, style: dict[str, str]) -> None:
        ends = [[scale * (x["value"] - x["low"])], [scale * (x["high"] - x["value"])]]
        drawn = axes.errorbar(scale * x["value"], y, y_error, ends, fmt="o", ms=4, lw=0.7, color=style["color"])
        drawn[0].set_fillstyle(style["fillstyle"])

    series: dict[str, Sequence[Changes]] = {"full": result["rows"], "none": result["true_rows"]}
    for fill, rows in series.items():
        for row in rows:
            method, reward, exchange = row["method"], row["reward"], row["exchange"]
            style = {"color": families.get(method.split()[0], GREEN), "fillstyle": fill}
            point(left, row["entropy"], 1e3 * reward["value"], 500 * (reward["high"] - reward["low"]), 1e3, style)
            if method in places and math.isfinite(exchange["low"]) and math.isfinite(exchange["high"]):
                point(right, exchange, places[method] + 0.25 * (fill == "none"), None, 1.0, style)
    for axes in (left, right):
        axes.axvline(0, color=GREY, lw=0.8)
    left.axhline(0, color=GREY, lw=0.8)
    left.set(xlabel="entropy change of a step, 1e-3 nats/token", ylabel="reward change of a step, 1e-3, 95 %")
    right.set(xlabel="exchange, reward per nat/token (hollow: true)")
    right.set_yticks(list(places.values()), list(places), fontsize=7)
    right.invert_yaxis()


COMMAND = Command(
    "exchange",
    "What does it cost in reward to keep entropy? Steps by several methods of entropy control from one fixed state. "
    "With RUN [RUN...] in place of --checkpoint: what each kind of token paid and earned in the steps that were made.",
    {
        "num_redraws": (24, 4, "independent redraws of the rollouts"),
        "num_completions": (4096, 128, "held-out completions on which changes are measured; a multiple of 128"),
        "num_measured": (6, 2, "redraws for which true changes are measured too"),
        "num_probe": (128, 4, "completions on which the entropy control takes grad h"),
    },
    compute,
    table,
    draw,
    check,
    lambda checkpoint, options: VECTORS_OF_STATE + 6 * NUM_BLOCKS + len(METHODS),
)


def main(argv: list[str] | None = None) -> None:
    """The experiment at a checkpoint; of runs that come first, the exchange that their own steps made (T22)."""
    given = sys.argv[1:] if argv is None else argv
    if given and not given[0].startswith("-"):
        exchange_of_runs.main(given)
    else:
        COMMAND.main(given)
