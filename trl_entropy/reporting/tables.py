"""Tables of a run's page: every number with the file that it stands in."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pandas as pd

from trl_entropy.analysis.run import Run
from trl_entropy.runs.metrics import OUTCOMES, OUTCOMES_BY_PROBABILITY, PASS_AT_1, unit

_SHARES = (*OUTCOMES, *OUTCOMES_BY_PROBABILITY)
_GLANCE = ("reward", "entropy/policy", "entropy/surprisal", "completions/mean_length")
_AGREEMENT = ("cross_linear", "cross_second_order", "same_sample_linear", "placebo")
_STATISTICS = ("slope", "corrected_slope", "correlation", "r_squared")


@dataclass(frozen=True)
class Cell:
    """A number of the page and where it stands in the run's files; the ends of its interval, if it has one."""

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
    """Rows of a label and its cells; None for what is not there."""

    heads: list[str]
    rows: list[tuple[str, list[Cell | None]]]
    title: str = ""


def glance_table(runs: list[Run]) -> Table:
    """First and last value of what a reader asks for first."""
    rows: list[tuple[str, list[Cell | None]]] = []
    for key in _GLANCE:
        rows.append((_named(key), [cell for run in runs for cell in _ends(run, "metrics.jsonl", run.steps, key)]))
    for key in (PASS_AT_1, "entropy"):
        cells = [c for run in runs for c in _ends(run, "evaluation/metrics.csv", run.training_evaluation, key)]
        rows.append((f"held out: {_named(key)}", cells))
    ends = [f"{run.name}, {end}" if len(runs) > 1 else end for run in runs for end in ("first", "last")]
    return Table(["", *ends], [row for row in rows if any(row[1])])


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
    """Agreement of prediction and measurement over the run so far, as its last step logged it."""
    rows = []
    for kind in _AGREEMENT:
        cells = [_ends(run, "metrics.jsonl", run.steps, f"entropy/{kind}_{name}")[1] for name in _STATISTICS]
        if any(cells):
            rows.append((kind.replace("_", " "), cells))
    return Table(["measured on predicted", *_STATISTICS], rows, run.name) if rows else None


def share_table(run: Run) -> Table | None:
    """Shares of the change that completions made over the run so far (T9), as its last attributed step logged them."""
    rows = []
    for name in _SHARES:
        share, tokens = (
            _ends(run, "metrics.jsonl", run.steps, f"entropy/{key}_{name}")[1] for key in ("share", "token_share")
        )
        if share is not None:
            ends = [
                _ends(run, "metrics.jsonl", run.steps, f"entropy/share_{name}_{end}")[1] for end in ("low", "high")
            ]
            rows.append((name.replace("_", ", "), [replace(share, ends=tuple(end for end in ends if end)), tokens]))
    heads = ["over the run", "share of the change, 95 %", "share of tokens"]
    return Table(heads, rows, run.name) if rows else None


def checkpoint_table(run: Run) -> Table:
    """A row a number, a column a checkpoint."""
    steps = sorted(run.evaluation["step"].unique())
    rows = []
    for metric, group in run.evaluation.groupby("metric", sort=False):
        found = {row["step"]: _checkpoint_cell(run, row) for row in group.to_dict("records")}
        rows.append((_named(str(metric)), [found.get(step) for step in steps]))
    return Table(["95 % intervals over problems", *(f"step {step}" for step in steps)], rows, run.name)


def _checkpoint_cell(run: Run, row: dict[str, Any]) -> Cell | None:
    """A number of an evaluated checkpoint; None where it has no value, such as the longest right sample of none."""
    file = "evaluation/checkpoints.csv"
    if pd.isna(row["value"]):
        return None
    ends = [(f"{row['metric']}_{end}", row[end]) for end in ("low", "high") if not pd.isna(row[end])]
    return Cell(
        run.name, file, row["metric"], int(row["step"]), float(row["value"]),
        tuple(Cell(run.name, file, key, int(row["step"]), float(value)) for key, value in ends),
    )  # fmt: skip
