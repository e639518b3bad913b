"""The page's section on what changed the entropy (T9): shares, completions token by token, and ranked prompts."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd

from trl_entropy.analysis import plots
from trl_entropy.analysis.attribution import (
    SHARE_MARGIN,
    attributed_steps,
    attribution_table,
    categories,
    has_right_answers,
    most_moving_tokens,
    outcome_text,
    own_rows,
    prices,
    ranked_prompts,
    shares,
)
from trl_entropy.analysis.run import Run
from trl_entropy.reporting.figures import Figure, draw, shade
from trl_entropy.reporting.tables import Table, price_table, share_table
from trl_entropy.runs.change_metrics import OUTCOMES, RELATIVE_OUTCOMES
from trl_entropy.runs.strict_json import Row

_CAPTION = (
    "what each category adds to the change that the steps' own completions made, with 95 % intervals over prompts, "
    "beside what it would add if all tokens changed the entropy alike. A category's share of the change stands at its "
    f"bar where the sum of all is further from 0 than {SHARE_MARGIN:g} times the half width of its 95 % interval."
)
_PRICES = (
    "what each category paid in entropy for what it earned in expected reward (T22), with 95 % intervals over "
    "prompts; the price, in nats per token lost for a unit of reward, where it has bounds (Fieller). The line is the "
    "price of all."
)
_COMPLETIONS, _PROMPTS, _TOKENS, _PROMPT_END = 3, 10, 15, 200
_RAISED, _LOWERED, _CONTEXT = "213 94 0", "0 114 178", "128 128 128"  # orange, blue and grey
_PANELS = {
    "outcome_probability": "outcome and rarity",
    "outcome": "outcome",
    "turn": "the policy's turn",
    "kind": "prose, calls and arguments",
    "entropy": "token's entropy, nats",
    "position": "position in the completion",
    "pass_rate": "prompt's {rate}",
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
    prices: Table | None
    price_figure: Figure | None
    completions: list[ColouredCompletion]
    tokens: list[str]
    prompts: list[str]


def attribution_section(run: Run) -> AttributionSection | None:
    """The section of a run, from the [`attributed_steps`] that can be read at once; None without attribution."""
    read = attributed_steps(run)
    if not read:
        return None
    episodes = _finite_steps(attribution_table(run, read, context=True))
    table = own_rows(episodes)
    by_token, has_answers = "token" in table, has_right_answers(table)
    first, last = table["step"].min(), table["step"].max()
    steps_shown = f"step {first}" if first == last else f"steps {first} to {last}"
    number = len(run.probe_steps("attribution"))
    if len(read) < number:
        steps_shown += f" ({len(read)} of the {number} that the run keeps)"
    return AttributionSection(
        run=run.name,
        steps=steps_shown,
        figure=draw(
            f"attribution-{run.name}",
            f"{run.name}, {steps_shown}: {_CAPTION}{_left_out(len(read) - table['step'].nunique())}",
            _panels(table, by_token),
        ),
        table=share_table(run, has_answers),
        prices=price_table(run, has_answers),
        price_figure=_price_figure(run, table, steps_shown) if "attribution_reward" in table else None,
        completions=_completions(episodes) if by_token else [],
        tokens=_token_lines(episodes, has_answers) if by_token else [],
        prompts=[_prompt_line(row, _rate(has_answers)) for row in _rows(ranked_prompts(run, table, _PROMPTS))],
    )


def _finite_steps(table: pd.DataFrame) -> pd.DataFrame:
    """The steps whose contributions are all finite numbers."""
    own = own_rows(table)
    bad = own.loc[~np.isfinite(own["attribution"].astype(float)), "step"].unique()
    if set(bad) == set(table["step"]):
        raise ValueError("the contributions of every step are nan or infinite")
    return table[~table["step"].isin(bad)].reset_index(drop=True)


def _left_out(number: int) -> str:
    return f" Left out: {number} of these steps, whose contributions are nan or infinite." if number else ""


def _rows(table: pd.DataFrame) -> list[Row]:
    return table.to_dict("records")


def _panels(table: pd.DataFrame, by_token: bool) -> list[Callable]:
    always, rate = "outcome_probability" if by_token else "outcome", _rate(has_right_answers(table))
    return [
        lambda axes, by=by, title=title: plots.plot_shares(
            axes, shares(table, categories(table, by)), title.format(rate=rate)
        )
        for by, title in _PANELS.items()
        if by in table or by == always
    ]


def _price_figure(run: Run, table: pd.DataFrame, steps_shown: str) -> Figure:
    always = "outcome_probability" if "token" in table else "outcome"
    panels = [
        lambda axes, by=by: plots.plot_prices(axes, prices(table, categories(table, by)), _PANELS[by])
        for by in (always, "turn", "kind")
        if by in table or by == always
    ]
    return draw(f"prices-{run.name}", f"{run.name}, {steps_shown}: {_PRICES}", panels)


def _rate(has_answers: bool) -> str:
    """What the mean reward of a prompt's group is called."""
    return "pass rate" if has_answers else "mean reward"


def _completions(tokens: pd.DataFrame) -> list[ColouredCompletion]:
    """The completions that changed the entropy most, each token coloured by its own contribution."""
    sums, has_answers = tokens.groupby(["step", "row"])["attribution"].sum(), has_right_answers(tokens)
    found = []
    for step, row in sums.abs().sort_values(ascending=False).index[:_COMPLETIONS]:
        mine = tokens[(tokens["step"] == step) & (tokens["row"] == row)]
        largest, first = mine["attribution"].abs().max(), mine.iloc[0]
        title = (
            f"step {first['step']}, {_outcome(first, has_answers)}, reward {first['reward']:.3g}: "
            f"{sums[step, row]:+.2e} nats/token"
        )
        found.append(ColouredCompletion(title, [_coloured_by_contribution(token, largest) for token in _rows(mine)]))
    return found


def _coloured_by_contribution(token: Row, largest: float) -> ColouredToken:
    if not token.get("own", True):
        return ColouredToken(token["token"], _CONTEXT, 40, "written by a tool or an environment")
    change = token["attribution"]
    return ColouredToken(
        token["token"],
        _RAISED if change > 0 else _LOWERED,
        shade(math.sqrt(abs(change)), math.sqrt(largest), 80),
        f"{change:+.2e} nats/token, probability {_probability(token)}",
    )


def _token_lines(table: pd.DataFrame, has_answers: bool) -> list[str]:
    return [
        f"{_change(token)}, step {token['step']}, {_outcome(token, has_answers)}, probability {_probability(token)}: "
        f"{token['text']}"
        for token in _rows(most_moving_tokens(table, _TOKENS))
    ]


def _prompt_line(prompt: Row, rate: str) -> str:
    about = f"{_change(prompt)}, step {prompt['step']}, {rate} {prompt['pass_rate']:.3g}"
    return f"{about}: …{prompt['prompt'][-_PROMPT_END:]}"


def _change(row: Row) -> str:
    return f"{row['attribution']:+.2e} nats/token"


def _outcome(row: Row | pd.Series, has_answers: bool) -> str:
    """Whether the answer is right, where rewards say so; else on which side of the group's mean its reward lies."""
    if has_answers:
        return outcome_text(OUTCOMES[int(row["reward"] == 0)])
    if row["advantage"] == 0:
        return "at the group's mean"
    return outcome_text(RELATIVE_OUTCOMES[int(row["advantage"] < 0)])


def _probability(token: Row) -> str:
    return f"{token.get('probability', float('nan')):.3g}"
