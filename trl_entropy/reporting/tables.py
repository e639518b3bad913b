"""Tables of the page: every number with the file, key and step that it was read from."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pandas as pd

from trl_entropy.analysis.attribution import SHARE_MARGIN, is_well_away, outcome_text
from trl_entropy.analysis.run import Run
from trl_entropy.runs.change_metrics import KINDS, OUTCOMES, OUTCOMES_BY_PROBABILITY, RELATIVE_OUTCOMES, TURNS
from trl_entropy.runs.metrics import PASS_AT_1, unit
from trl_entropy.runs.strict_json import Row

_SHARES = (*OUTCOMES, *OUTCOMES_BY_PROBABILITY)
_MEAN, _SHARE = "entropy/mean_delta_", "entropy/share_"
_GLANCE = ("reward", "entropy/policy", "entropy/surprisal", "completions/mean_length")
_AGREEMENT = {
    "cross_linear": "first order, predicted and measured on different prompts",
    "cross_second_order": "second order, predicted and measured on different prompts",
    "same_sample_linear": "first order, predicted and measured on the same completions",
    "placebo": "control: first order, predicted from an earlier step's update",
}
_STATISTICS = ("slope", "corrected_slope", "correlation", "r_squared")


@dataclass(frozen=True)
class Cell:
    """A number of the page, where it stands in the run's files, and the two ends of its interval if it has one."""

    run: str
    file: str
    key: str
    step: int
    value: float
    ends: tuple[Cell, ...] = ()

    @property
    def text(self) -> str:
        return f"{self.value:.4g}"


@dataclass(frozen=True)
class Table:
    """Column heads, rows, and a sentence below them; a row is a label and its cells, None where there is no number."""

    heads: list[str]
    rows: list[tuple[str, list[Cell | None]]]
    title: str = ""
    note: str = ""


def glance_table(runs: list[Run]) -> Table:
    """Reward, entropy, length and held-out results at the first and the last step."""
    rows: list[tuple[str, list[Cell | None]]] = []
    for key in _GLANCE:
        rows.append((_named(key), [cell for run in runs for cell in _ends(run, "metrics.jsonl", run.steps, key)]))
    tables = {run.name: _by_evaluation_set(run) for run in runs}
    for name in dict.fromkeys(name for named in tables.values() for name in named):
        for key in (PASS_AT_1, "entropy"):
            found = [(run, tables[run.name].get(name, pd.DataFrame())) for run in runs]
            cells = [cell for run, table in found for cell in _ends(run, "evaluation/metrics.csv", table, key)]
            rows.append((f"held out{f', {name}' if name else ''}: {_named(key)}", cells))
    ends = [f"{run.name}, {end}" if len(runs) > 1 else end for run in runs for end in ("first", "last")]
    return Table(["", *ends], [row for row in rows if any(row[1])])


def _by_evaluation_set(run: Run) -> dict[str, pd.DataFrame]:
    """The rows of `evaluation/metrics.csv` by the name of their set; a run with one set has no names."""
    table = run.training_evaluation
    if "dataset" not in table:
        return {"": table}
    return {str(name): rows for name, rows in table.groupby(table["dataset"].fillna("").astype(str), sort=False)}


def _ends(run: Run, file: str, table: pd.DataFrame, key: str) -> list[Cell | None]:
    values = table[key].dropna() if key in table else pd.Series(dtype=float)
    if values.empty:
        return [None, None]
    return [Cell(run.name, file, key, int(step), float(values[step])) for step in (values.index[0], values.index[-1])]


def _named(key: str) -> str:
    if key == PASS_AT_1:
        return "pass@1"
    return f"{key} ({unit(key)})" if unit(key) not in ("", "1", "reward") else key


def agreement_table(run: Run) -> Table | None:
    """How well predictions agree with measurements over the run, as its last probed step logged it."""
    rows = []
    for kind in _AGREEMENT:
        cells = [_ends(run, "metrics.jsonl", run.steps, f"entropy/{kind}_{name}")[1] for name in _STATISTICS]
        if any(cells):
            rows.append((_AGREEMENT[kind], cells))
    heads = ["measured on predicted change", *(name.replace("_", " ") for name in _STATISTICS)]
    return Table(heads, rows, run.name) if rows else None


def share_table(run: Run, has_answers: bool) -> Table | None:
    """
    What each outcome's completions or tokens add to the change over the run (T9), and their shares of it.

    Args:
        has_answers: whether rewards are 0 or 1, so that outcomes are called correct and incorrect.
    """
    whole = _ends(run, "metrics.jsonl", run.steps, f"{_MEAN}all")[1]
    if whole is None:
        return None
    whole = _with_interval(run, whole)
    has_shares = len(whole.ends) == 2 and is_well_away(whole.value, whole.ends[1].value - whole.value)
    rows: list[tuple[str, list[Cell | None]]] = []

    def add(name: str, text: str) -> None:
        change, share, tokens = (
            _at(run, whole.step, f"{key}{name}") for key in (_MEAN, _SHARE, "entropy/token_share_")
        )
        if change is not None:
            part = _with_interval(run, share) if has_shares and share is not None else None
            rows.append((text, [_with_interval(run, change), part, tokens]))

    for name in _SHARES:
        add(name, _outcome_named(name, has_answers))
    rows.append(("all of these", [whole, None, None]))
    for name in (*TURNS, *KINDS):
        add(name, outcome_text(name))
    heads = [
        "over the run",
        "change of a step, nats/token (95 %)",
        "share of the change (95 %)",
        "share of the tokens",
    ]
    rule = f"is further from 0 than {SHARE_MARGIN:g} times the half width of its 95 % interval"
    note = f"Shares are given only where the change of all {rule}{'.' if has_shares else '; here it is not.'}"
    return Table(heads, rows, run.name, note)


def price_table(run: Run, has_answers: bool) -> Table | None:
    """What each outcome's completions or tokens paid in entropy for what they earned in reward over the run (T22)."""
    whole = _ends(run, "metrics.jsonl", run.steps, "reward/price_all")[1]
    if whole is None:
        return None
    rows: list[tuple[str, list[Cell | None]]] = []
    for name in (*_SHARES, "all", *TURNS, *KINDS):
        keys = (f"{_MEAN}{name}", f"reward/mean_delta_{name}", f"reward/price_{name}")
        cells = [_at(run, whole.step, key) for key in keys]
        if cells[1] is not None:
            outcome = outcome_text(name) if name in (*TURNS, *KINDS) else _outcome_named(name, has_answers)
            text = "all of these" if name == "all" else outcome
            rows.append((text, [None if cell is None else _with_interval(run, cell) for cell in cells]))
    heads = [
        "over the run",
        "entropy change of a step, nats/token (95 %)",
        "reward change of a step (95 %)",
        "nats/token lost for a unit of reward (95 %)",
    ]
    note = "A price without an interval has none: its reward change is consistent with 0."
    return Table(heads, rows, run.name, note)


def _at(run: Run, step: int, key: str) -> Cell | None:
    """The number of a key at a step of `metrics.jsonl`; None where it is nan or not there."""
    value = run.steps[key].get(step) if key in run.steps else None
    return None if value is None or pd.isna(value) else Cell(run.name, "metrics.jsonl", key, step, float(value))


def _with_interval(run: Run, cell: Cell) -> Cell:
    ends = [_at(run, cell.step, f"{cell.key}_{end}") for end in ("low", "high")]
    return replace(cell, ends=tuple(end for end in ends if end is not None and math.isfinite(end.value)))


def _outcome_named(name: str, has_answers: bool) -> str:
    if has_answers:
        return outcome_text(name)
    outcome, *rarity = name.split("_")
    return outcome_text("_".join([RELATIVE_OUTCOMES[OUTCOMES.index(outcome)], *rarity]))


def checkpoint_table(run: Run) -> Table:
    """A row for each metric, a column for each evaluated checkpoint."""
    steps = sorted(run.evaluation["step"].unique())
    rows = []
    for metric, group in run.evaluation.groupby("metric", sort=False):
        found = {row["step"]: _checkpoint_cell(run, row) for row in group.to_dict("records")}
        rows.append((_named(str(metric)), [found.get(step) for step in steps]))
    return Table(["with 95 % intervals over problems", *(f"step {step}" for step in steps)], rows, run.name)


def _checkpoint_cell(run: Run, row: Row) -> Cell | None:
    """A number of an evaluated checkpoint; None if it has no value (no sample is correct, so none is longest)."""
    file = "evaluation/checkpoints.csv"
    if pd.isna(row["value"]):
        return None
    ends = [(f"{row['metric']}_{end}", row[end]) for end in ("low", "high") if not pd.isna(row[end])]
    return Cell(
        run.name, file, row["metric"], int(row["step"]), float(row["value"]),
        tuple(Cell(run.name, file, key, int(row["step"]), float(value)) for key, value in ends),
    )  # fmt: skip
