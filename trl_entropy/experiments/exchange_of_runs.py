"""
What did each kind of token pay in entropy for what it earned in reward? Of the steps that runs made (T22).

    trl-entropy experiment exchange RUN [RUN...]

Reads the files of runs with `reward_attribution`: by outcome and rarity, and with tools or an environment by turn and
by kind of token, the parts of the first-order changes of entropy and of expected reward, summed over steps, and their
ratio with Fieller's interval. These are the steps that were made; what a step by another rule would exchange is told
by `--checkpoint`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TypedDict

import pandas as pd

from trl_entropy.analysis.attribution import (
    attributed_steps,
    attribution_table,
    categories,
    outcome_text,
    own_rows,
    prices,
)
from trl_entropy.analysis.run import load_run
from trl_entropy.experiments.output import Numbers, saved_figure, with_interval, write_numbers
from trl_entropy.runs.console import quiet_libraries
from trl_entropy.runs.directory import RunDirectory
from trl_entropy.runs.file_errors import describe

_PARTS = ("outcome", "outcome_probability", "turn", "kind")


class Row(TypedDict):
    """A category's part of the changes of a step, and its price, each with the ends of its 95 % interval."""

    by: str
    category: str
    lost: Numbers
    earned: Numbers
    price: Numbers


class Result(TypedDict):
    """What `exchange.json` holds of a run; entropy in nats per token."""

    run: str
    steps: list[int]
    rows: list[Row]


def prices_of(path: Path) -> tuple[Result, dict[str, pd.DataFrame]]:
    """
    The prices of a run, as plain data, and the table of each division of its tokens.

    Raises:
        ValueError: if no step of the run attributed its change of reward.
    """
    run = load_run(path)
    steps = attributed_steps(run)
    table = own_rows(attribution_table(run, steps)) if steps else pd.DataFrame()
    if "attribution_reward" not in table:
        raise ValueError(
            f"{path} holds no attribution of the reward; train with entropy_probe: true, entropy_attribution: token "
            "and reward_attribution: true"
        )
    table = table[table["attribution_reward"].notna()].reset_index(drop=True)
    tables = {
        by: prices(table, categories(table, by))
        for by in _PARTS
        if by in table or by == "outcome" or (by == "outcome_probability" and "probability" in table)
    }
    rows = [_row(by, str(name), row) for by, found in tables.items() for name, row in found.iterrows()]
    return {"run": path.name, "steps": sorted({int(step) for step in table["step"]}), "rows": rows}, tables


def _row(by: str, name: str, row: pd.Series) -> Row:
    def numbers(what: str, low: str, high: str) -> Numbers:
        return {"value": float(row[what]), "low": float(row[low]), "high": float(row[high])}

    lost, earned = (numbers(what, f"{what}_low", f"{what}_high") for what in ("lost", "earned"))
    return {"by": by, "category": name, "lost": lost, "earned": earned, "price": numbers("price", "low", "high")}


def markdown(results: list[Result]) -> str:
    """A table for each run."""
    return "\n\n".join("\n".join(_lines(result)) for result in results)


def _lines(result: Result) -> Iterator[str]:
    first, last, number = result["steps"][0], result["steps"][-1], len(result["steps"])
    yield f"{result['run']}, {number} steps of {first} to {last}; 95 % intervals over prompts"
    yield ""
    yield "| by | tokens | entropy lost a step, 1e-3 nats/token | reward earned a step, 1e-3 | price, nats/token |"
    yield "|---|---|---|---|---|"
    for row in result["rows"]:
        cells = (
            with_interval(row["lost"], 1e3, ".3g"),
            with_interval(row["earned"], 1e3, ".3g"),
            _price(row["price"]),
        )
        name = "all of these" if row["category"] == "all" else outcome_text(row["category"])
        yield f"| {row['by'].replace('_', ' and ')} | {name} | {' | '.join(cells)} |"


def _price(price: Numbers) -> str:
    if price["low"] == float("-inf"):
        return "none: the reward's part is consistent with 0"
    return with_interval(price, form=".3g")


def main(argv: list[str]) -> None:
    """Print the tables, and write `exchange.json` and `exchange.png` into the first run's report or `--output`."""
    from trl_entropy.analysis import plots

    parser = argparse.ArgumentParser(prog="trl-entropy experiment exchange", description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run directory, with reward_attribution")
    parser.add_argument("--output", type=Path, help="folder to write to (default: RUN/report of the first run)")
    options = parser.parse_args(argv)
    quiet_libraries()
    try:
        found = [prices_of(path) for path in options.runs]
    except ValueError as error:
        sys.exit(f"Error: {describe(error)}.")
    output = options.output or RunDirectory(options.runs[0]).report_path
    output.mkdir(parents=True, exist_ok=True)
    write_numbers(output / "exchange.json", [result for result, _ in found])
    panels = [(result["run"], by, table) for result, tables in found for by, table in tables.items()]
    with saved_figure(output / "exchange.png", (4.6, 4.2 * len(panels)), dpi=130) as figure:
        for axes, (run, by, table) in zip(figure.subplots(len(panels), 1, squeeze=False)[:, 0], panels, strict=True):
            plots.plot_prices(axes, table, f"{run}, by {by.replace('_', ' and ')}")
    print(markdown([result for result, _ in found]))
    print(f"\n{output / 'exchange.json'}\n{output / 'exchange.png'}")
