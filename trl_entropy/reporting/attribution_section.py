"""Who moved the entropy, on a run's page: shares, real completions token by token, prompts ranked (T9)."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd

from trl_entropy.analysis import plots
from trl_entropy.analysis.attribution import (
    attribution_table,
    categories,
    most_moving_tokens,
    ranked_prompts,
    shares,
)
from trl_entropy.analysis.run import Run
from trl_entropy.reporting.figures import Figure, draw
from trl_entropy.reporting.tables import Table, share_table
from trl_entropy.runs.metrics import OUTCOMES

_STEPS, _COMPLETIONS, _PROMPTS, _TOKENS, _PROMPT_END = 60, 3, 10, 15, 200
_PANELS = {
    "outcome_probability": "outcome and rarity",
    "outcome": "outcome",
    "entropy": "token's entropy, nats",
    "position": "position in the completion",
    "pass_rate": "prompt's pass rate",
}


@dataclass(frozen=True)
class ColouredToken:
    """A token's text, a colour and how much of it, and what the pointer shows."""

    text: str
    rgb: str
    shade: int
    hint: str


@dataclass(frozen=True)
class AttributedCompletion:
    """A completion, token or prompt with what it did."""

    title: str
    tokens: list[ColouredToken]


@dataclass(frozen=True)
class WhoMovedIt:
    """What the page shows of one run."""

    run: str
    steps: str
    figure: Figure
    table: Table | None
    completions: list[AttributedCompletion]
    sentences: list[str]
    prompts: list[str]


def who_moved_it(run: Run) -> WhoMovedIt | None:
    """Of the run's attributed steps, at most 60 of them, evenly; None for a run without attribution."""
    steps = run.probe_steps("attribution")
    if not steps:
        return None
    steps = steps[:: -(-len(steps) // _STEPS)]
    table = attribution_table(run, steps)
    by_token = "token" in table
    shown = {
        by: title
        for by, title in _PANELS.items()
        if by in table or by == ("outcome_probability" if by_token else "outcome")
    }
    panels = [
        lambda axes, by=by, title=title: plots.plot_shares(axes, shares(table, categories(table, by)), title)
        for by, title in shown.items()
    ]
    caption = (
        f"{run.name}, steps {steps[0]} to {steps[-1]}: share of the change that the steps' own completions made, 95 % "
        "interval over prompts, beside the share of tokens."
    )
    prompts = ranked_prompts(run, table, _PROMPTS)
    return WhoMovedIt(
        run.name,
        f"{steps[0]} to {steps[-1]}",
        draw(f"who-moved-it-{run.name}", caption, panels),
        share_table(run),
        _completions(table) if by_token else [],
        [_sentence(row) for row in most_moving_tokens(table, _TOKENS).to_dict("records")] if by_token else [],
        [f"{_signed(row)}, step {row['step']}, pass rate {row['pass_rate']:.3g}: …{row['prompt'][-_PROMPT_END:]}"
         for row in prompts.to_dict("records")],
    )  # fmt: skip


def _completions(tokens: pd.DataFrame) -> list[AttributedCompletion]:
    """Those that moved the entropy most, each token coloured by what it did."""
    sums = tokens.groupby(["step", "row"])["attribution"].sum()
    movers = []
    for step, row in sums.abs().sort_values(ascending=False).index[:_COMPLETIONS]:
        mine = tokens[(tokens["step"] == step) & (tokens["row"] == row)]
        largest = mine["attribution"].abs().max() or 1.0
        first = mine.iloc[0]
        outcome = OUTCOMES[int(first["advantage"] <= 0)]
        title = f"step {first['step']}, {outcome}, reward {first['reward']:.3g}: {sums[step, row]:+.2e} nats per token"
        movers.append(AttributedCompletion(title, [_coloured(token, largest) for token in mine.to_dict("records")]))
    return movers


def _coloured(token: dict, largest: float) -> ColouredToken:
    moved = token["attribution"]
    return ColouredToken(
        token["token"],
        "213 94 0" if moved > 0 else "0 114 178",
        round(80 * (abs(moved) / largest) ** 0.5),
        f"{moved:+.2e} nats per token, probability {token.get('probability', float('nan')):.3g}",
    )


def _sentence(token: dict) -> str:
    outcome = OUTCOMES[int(token["advantage"] <= 0)]
    probability = token.get("probability", float("nan"))
    return f"{_signed(token)}, step {token['step']}, {outcome}, probability {probability:.3g}: {token['text']}"


def _signed(row: dict) -> str:
    return f"{row['attribution']:+.2e} nats per token"
