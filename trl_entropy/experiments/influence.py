"""
Which completion of the update batch changes which completion of a probe batch, and by how much? At one fixed state.

    trl-entropy experiment influence --checkpoint RUN/checkpoint-N [--check 64]

One pass over the update batch U and two over the probe batch E give two matrices: how much completion u of U changes,
to first order, the share of completion e of E in the entropy (T9), and its log-probability (T12). The sum of the first
matrix over E is the attribution of u. `--check N` leaves N completions out of the step, one at a time, and measures
how the entropy change differs without them.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, NotRequired, TypedDict

import torch
from jaxtyping import Float
from torch import Tensor, nn

from trl_entropy.engine.optimizer_step import metric_of_step, update_parts
from trl_entropy.estimators.attribution.shares import UpdateProducts, update_products
from trl_entropy.estimators.rows.row_sums import Rows
from trl_entropy.experiments.checkpoint import Checkpoint
from trl_entropy.experiments.command import VECTORS_OF_STATE, Command
from trl_entropy.experiments.influence_check import Check, check_by_leaving_out
from trl_entropy.experiments.output import Numbers
from trl_entropy.experiments.redraws import Cache, pool_and_entropy
from trl_entropy.experiments.state import FixedState
from trl_entropy.gradients.group_gradients import flat
from trl_entropy.gradients.scores import score
from trl_entropy.gradients.sequence_products import (
    Value,
    consumed,
    entropy_gradient,
    entropy_shares,
    gradient_products,
    weighted_logps,
)
from trl_entropy.rollouts.completions import Completions

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MODES = ("sequence", "token")
_ROWS_AT_ONCE = 64  # probe completions whose gradients are held


class CompletionRow(TypedDict):
    """A completion of U: what it changes in the entropy and, on average, in E's log-probabilities; and what it is."""

    completion: int
    prompt: int
    attribution: float
    mean_logp_change: float
    reward: float
    advantage: float
    length: int
    text: str


class Result(TypedDict):
    """What `influence.json` holds; changes in nats per token, `matrices` the file of the two matrices."""

    num_probe_completions: int
    policy_entropy: float
    parts: Numbers
    matrices: str
    row_sum_error: float
    rank_one_share: list[float]
    process_seconds: Numbers
    completions: list[CompletionRow]
    check: NotRequired[Check]


def influence_matrices(
    state: FixedState, probe: Completions, entropy: float, batch_size: int
) -> Float[Tensor, "2 U E"]:
    """
    What each completion of U changes in each completion of E: first in its share of the entropy (nats per token),
    then in its log-probability (nats).

    Args:
        probe: E, independent of U.
        entropy: h on E.
    """
    temperature, names = state.args.temperature, list(state.engine.parameters)
    update_batch, metric = Completions.of(state.rollouts), flat(metric_of_step(state.context), names)
    num_tokens = float(probe.lengths.sum())
    values = entropy_shares(entropy, num_tokens), weighted_logps(probe.loss_mask.float())

    def rows(model: nn.Module, completions: Completions, value: Value) -> Float[Tensor, "n D"]:
        make = partial(Rows, len(completions))
        return consumed(model, completions, value, make, temperature, batch_size).values

    columns = []
    with state.engine.scoring_model(state.before) as model:
        steps = -metric * rows(model, update_batch, weighted_logps(-state.loss_coefficients))
        for index in torch.arange(len(probe)).split(_ROWS_AT_ONCE):
            part = probe.rows(index)
            columns.append(torch.stack([steps @ rows(model, part, value).T for value in values]))
    return torch.cat(columns, dim=2).cpu()


def attribution(
    state: FixedState, probe: Completions, entropy: float, batch_size: int
) -> tuple[UpdateProducts, Float[Tensor, " U"]]:
    """(T9) with grad h of E: the shares of momentum, decay and gradient, and the latter by completion of U."""
    temperature, num_tokens = state.args.temperature, float(probe.lengths.sum())
    with state.engine.scoring_model(state.before) as model:
        gradient = entropy_gradient(model, probe, temperature, batch_size, entropy, num_tokens)
        products = update_products((gradient[name], parts) for name, parts in update_parts(state.context))
        direction = {name: metric * gradient[name] for name, metric in metric_of_step(state.context).items()}
        completions, coefficients = Completions.of(state.rollouts), state.loss_coefficients
        found = gradient_products(
            model, completions, weighted_logps(-coefficients), direction, temperature, batch_size
        )
    return products, -found.cpu()


def process_seconds(state: FixedState, batch_size: int) -> dict[str, float]:
    """CPU seconds of one pass over U: of a forward and backward pass, of attribution by sequence and by token."""
    completions, coefficients = Completions.of(state.rollouts), state.loss_coefficients
    temperature, direction = state.args.temperature, metric_of_step(state.context)
    entropy, number = 0.0, float(len(completions))

    def seconds(work: Callable[[nn.Module], object]) -> float:
        with state.engine.scoring_model(state.before) as model:
            start = time.process_time()
            work(model)
            return time.process_time() - start

    return {
        "forward_backward": seconds(
            lambda model: entropy_gradient(model, completions, temperature, batch_size, entropy, number)
        ),
        "sequence": seconds(
            lambda model: gradient_products(
                model, completions, weighted_logps(coefficients), direction, temperature, batch_size
            )
        ),
        "token": seconds(
            lambda model: score(model, completions, temperature, batch_size, state.before, direction, order=1)
        ),
    }


def compute(state: FixedState, cache: Cache, options: argparse.Namespace) -> Result:
    """The matrices, their sums against the attribution, and the check. The matrices stay in the cache."""
    num_probe, batch_size = options.num_completions, options.batch_size
    probe, entropy = pool_and_entropy(state, num_probe, options.seed, batch_size)
    name = f"influence-{num_probe}"
    matrices = cache.get(name, lambda: influence_matrices(state, probe, entropy, batch_size))
    products, by_completion = attribution(state, probe, entropy, batch_size)
    result: Result = {
        "num_probe_completions": num_probe,
        "policy_entropy": entropy,
        "parts": products._asdict(),
        "matrices": str(cache.folder / f"{name}.pt"),
        "row_sum_error": float((matrices[0].double().sum(1) - by_completion).abs().max() / by_completion.abs().sum()),
        "rank_one_share": [_rank_one_share(matrix) for matrix in matrices],
        "process_seconds": process_seconds(state, batch_size),
        "completions": _completions(state, matrices, by_completion),
    }
    if options.check:
        result["check"] = check_by_leaving_out(state, cache, probe, options.check, batch_size)
    return result


def _rank_one_share(matrix: Float[Tensor, "U E"]) -> float:
    """Share of the first singular value in the sum of squares: 1 if all completions of E are changed alike."""
    squares = torch.linalg.svdvals(matrix.double()).square()
    return float(squares[0] / squares.sum())


def _completions(state: FixedState, matrices: Tensor, by_completion: Tensor) -> list[CompletionRow]:
    """A row for each completion of U; the one that changes the entropy most comes first."""
    batch, tokenizer = state.rollouts, state.trainer._tokenizer
    rows: list[CompletionRow] = []
    for u in by_completion.abs().argsort(descending=True).tolist():
        ids = batch.completion_ids[u][batch.completion_mask[u].bool()]
        rows.append({
            "completion": u, "prompt": int(batch.prompt_index[u]), "attribution": float(by_completion[u]),
            "mean_logp_change": float(matrices[1, u].mean()), "reward": float(batch.rewards[u]),
            "advantage": float(batch.raw_advantages[u]), "length": len(ids), "text": tokenizer.decode(ids),
        })  # fmt: skip
    return rows


def table(result: Result) -> str:
    """The result as text, with changes in units of 1e-3 nats per token."""
    parts, rows = result["parts"], result["completions"]
    whole = sum(parts.values())
    lines = ["| part | x 1e-3 nats/token | share |", "|---|---|---|"]
    groups = {
        "right": [row for row in rows if row["advantage"] > 0],
        "wrong": [row for row in rows if row["advantage"] < 0],
    }
    values = parts | {name: sum(row["attribution"] for row in group) for name, group in groups.items()}
    labels = {"right": "gradient, advantage > 0", "wrong": "gradient, advantage < 0"}
    lines += [f"| {labels.get(n, n)} | {1e3 * value:.4f} | {value / whole:.3f} |" for n, value in values.items()]
    absolute = [abs(row["attribution"]) for row in rows]
    tenth = sum(absolute[: max(1, len(rows) // 10)]) / sum(absolute)
    lines += [
        "\nlargest difference between row sums of the matrix and the streamed attribution, over the sum of "
        f"|attribution|: {result['row_sum_error']:.1e}",
        f"the tenth of the completions with the largest effect make {tenth:.0%} of the sum of |attribution|",
        "share of the first singular value in the sum of squares: {:.0%} (entropy), {:.0%} (log-probability)".format(
            *result["rank_one_share"]
        ),
        "CPU time of attribution, in forward and backward passes of U: by sequence {:.2f}, by token {:.2f}".format(
            *(result["process_seconds"][name] / result["process_seconds"]["forward_backward"] for name in _MODES)
        ),
        "\ncompletions with the largest effect on the entropy:",
    ]
    lines += [
        f"{1e3 * row['attribution']:+.4f}  advantage {row['advantage']:+.3f}  {' '.join(row['text'].split())[:90]}"
        for row in rows[:8]
    ]
    return "\n".join([*lines, *_check_lines(result.get("check"))])


def _check_lines(check: Check | None) -> list[str]:
    if check is None:
        return []
    lines = [
        f"\n{check['num_left_out']} completions left out of the step, one at a time, in float64 at {check['scale']:g} "
        "of the learning rate; true change against attribution:"
    ]
    for label, found in (("held fixed", check["held"]), ("free", check["free"])):
        lines.append(f"M {label}: correlation {found['correlation']:.5f}, slope {found['slope']:.4f}")
    return lines


def draw(result: Result, left: Axes, right: Axes) -> None:
    """Left: attribution against advantage. Right: the check, or without one the cumulated share of |attribution|."""
    from trl_entropy.analysis.plots import BLUE, GREY, ORANGE

    rows = result["completions"]
    left.axhline(0, color=GREY, lw=0.8)
    left.plot([row["advantage"] for row in rows], [1e3 * row["attribution"] for row in rows], ".", color=BLUE)
    left.set(xlabel="advantage", ylabel="attribution, 1e-3 nats/token")
    check = result.get("check")
    if check is None:
        total = torch.tensor([abs(row["attribution"]) for row in rows]).cumsum(0)
        right.plot(range(1, len(rows) + 1), (total / total[-1]).tolist(), color=BLUE)
        right.set(xlabel="completions, largest effect first", ylabel="share of the sum of |attribution|", ylim=(0, 1))
        return
    for label, found, color in (("free", check["free"], ORANGE), ("held fixed", check["held"], BLUE)):
        right.plot(check["attribution"], found["true"], ".", color=color, label=f"M {label}")
    right.plot(check["attribution"], check["attribution"], color=GREY, lw=0.8)
    right.set(xlabel="attribution, nats/token", ylabel="true change made by the completion, nats/token")
    right.legend(frameon=False)


def _vectors(checkpoint: Checkpoint, options: argparse.Namespace) -> int:
    """The gradients of all completions of U, twice while they are multiplied by the metric, and of some of E."""
    num_completions = checkpoint.num_prompts_per_step * checkpoint.config["num_generations"]
    return VECTORS_OF_STATE + 2 * num_completions + 2 * _ROWS_AT_ONCE


COMMAND = Command(
    "influence",
    "Which completion of the update batch changes which completion of a probe batch? At one fixed state.",
    {
        "num_completions": (256, 4, "probe completions"),
        "check": (0, 0, "completions that are left out of the step, one at a time, as a check; 0: none"),
    },
    compute,
    table,
    draw,
    vectors=_vectors,
)
main = COMMAND.main
