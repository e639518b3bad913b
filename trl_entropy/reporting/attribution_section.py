"""The page's section on what changed the entropy (T9): shares, completions token by token, and ranked prompts."""

from __future__ import annotations

from collections.abc import Callable
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
from trl_entropy.runs.strict_json import Row

_STEPS, _COMPLETIONS, _PROMPTS, _TOKENS, _PROMPT_END = 60, 3, 10, 15, 200
_RAISED, _LOWERED = "213 94 0", "0 114 178"  # orange and blue
_PANELS = {
    "outcome_probability": "outcome and rarity",
    "outcome": "outcome",
    "entropy": "token's entropy, nats",
    "position": "position in the completion",
    "pass_rate": "prompt's pass rate",
}


@dataclass(frozen=True)
class ColouredToken:
    """The text of a token, its colour and the colour's strength in percent, and what the pointer shows."""

    text: str
    rgb: str
    shade: int
    hint: str


@dataclass(frozen=True)
class ColouredCompletion:
    """A completion whose tokens are coloured by a number of each."""

    title: str
    tokens: list[ColouredToken]


@dataclass(frozen=True)
class AttributionSection:
    """What the page shows of one run."""

    run: str
    steps: str
    figure: Figure
    table: Table | None
    completions: list[ColouredCompletion]
    tokens: list[str]
    prompts: list[str]


def attribution_section(run: Run) -> AttributionSection | None:
    """The section of a run, from at most 60 of its attributed steps, evenly spaced; None without attribution."""
    steps = run.probe_steps("attribution")
    if not steps:
        return None
    steps = steps[:: -(-len(steps) // _STEPS)]
    table = attribution_table(run, steps)
    by_token = "token" in table
    caption = (
        f"{run.name}, steps {steps[0]} to {steps[-1]}: each category's share of the change that the steps' own "
        "completions made, with 95 % intervals over prompts, and its share of the tokens."
    )
    return AttributionSection(
        run=run.name,
        steps=f"{steps[0]} to {steps[-1]}",
        figure=draw(f"attribution-{run.name}", caption, _panels(table, by_token)),
        table=share_table(run),
        completions=_completions(table) if by_token else [],
        tokens=[_token_line(row) for row in _rows(most_moving_tokens(table, _TOKENS))] if by_token else [],
        prompts=[_prompt_line(row) for row in _rows(ranked_prompts(run, table, _PROMPTS))],
    )


def _rows(table: pd.DataFrame) -> list[Row]:
    return table.to_dict("records")


def _panels(table: pd.DataFrame, by_token: bool) -> list[Callable]:
    always = "outcome_probability" if by_token else "outcome"
    return [
        lambda axes, by=by, title=title: plots.plot_shares(axes, shares(table, categories(table, by)), title)
        for by, title in _PANELS.items()
        if by in table or by == always
    ]


def _completions(tokens: pd.DataFrame) -> list[ColouredCompletion]:
    """The completions that changed the entropy most, each token coloured by its own contribution."""
    sums = tokens.groupby(["step", "row"])["attribution"].sum()
    found = []
    for step, row in sums.abs().sort_values(ascending=False).index[:_COMPLETIONS]:
        mine = tokens[(tokens["step"] == step) & (tokens["row"] == row)]
        largest = mine["attribution"].abs().max() or 1.0
        first = mine.iloc[0]
        title = (
            f"step {first['step']}, {_outcome(first)}, reward {first['reward']:.3g}: {sums[step, row]:+.2e} nats/token"
        )
        found.append(ColouredCompletion(title, [_coloured_by_contribution(token, largest) for token in _rows(mine)]))
    return found


def _coloured_by_contribution(token: Row, largest: float) -> ColouredToken:
    change = token["attribution"]
    return ColouredToken(
        token["token"],
        _RAISED if change > 0 else _LOWERED,
        round(80 * (abs(change) / largest) ** 0.5),
        f"{change:+.2e} nats/token, probability {_probability(token)}",
    )


def _token_line(token: Row) -> str:
    outcome, probability = _outcome(token), _probability(token)
    return f"{_change(token)}, step {token['step']}, {outcome}, probability {probability}: {token['text']}"


def _prompt_line(prompt: Row) -> str:
    about = f"{_change(prompt)}, step {prompt['step']}, pass rate {prompt['pass_rate']:.3g}"
    return f"{about}: …{prompt['prompt'][-_PROMPT_END:]}"


def _change(row: Row) -> str:
    return f"{row['attribution']:+.2e} nats/token"


def _outcome(row: Row | pd.Series) -> str:
    return OUTCOMES[int(row["advantage"] <= 0)]


def _probability(token: Row) -> str:
    return f"{token.get('probability', float('nan')):.3g}"
