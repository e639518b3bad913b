"""
Which completions of which steps a page has room for: those with the largest effect on the entropy. Imports no torch.

Three layers share the room, and each is cut by size of effect: the steps whose groups and completions are tabled, by
the size of their measured change; of these the completions whose tokens are shown, by what they added to the change.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from trl_entropy.analysis import views
from trl_entropy.analysis.run import Run
from trl_entropy.reporting.gaps import Gaps

MOST_BYTES = 10_000_000  # of all runs' completions and tokens on one page
_TABLES_SHARE = 0.45  # of the room is for tables of groups and completions, if tokens need the rest
_WITH_MEASURED = 1.5  # a step shows half as many completions of its probe batch as of its own
_BYTES_OF_TOKEN, _BYTES_OF_COMPLETION = 34, 60


@dataclass
class Chosen:
    """
    What is shown of a step.

    Attributes:
        groups, completions: the tables of the step.
        rows: the completions whose tokens, or texts, are shown.
    """

    step: int
    groups: pd.DataFrame
    completions: pd.DataFrame
    rows: list[int] = field(default_factory=list)

    @property
    def has_tokens(self) -> bool:
        """Whether the completions have tokens, and not texts alone."""
        return "text" not in self.completions

    @property
    def sizes(self) -> pd.Series:
        """An estimate of the bytes that the tokens, or the text, of each completion take."""
        table = self.completions
        if not self.has_tokens:
            return table["text"].str.len() + 10.0
        context = table.get("context_length", 0)
        return _BYTES_OF_TOKEN * (table["length"] + context).astype(float)

    @property
    def effects(self) -> pd.Series:
        """What completions are ranked by: the size of their part of the change, else of their advantage."""
        table, by = self.completions, "change" if "change" in self.completions else "advantage"
        return table[by].astype(float).abs().fillna(0.0)


def choose(run: Run, most_bytes: int, gaps: Gaps) -> tuple[list[Chosen], list[str]]:
    """
    What of a run is shown within about this many bytes, and a sentence for each layer that was cut.

    Args:
        run: the run.
        most_bytes: of the JSON of its groups, completions and tokens.
        gaps: gets the steps whose files cannot be read.
    """
    steps = views.steps_with_completions(run)
    tables, left = _tables(run, steps, most_bytes * _TABLES_SHARE, gaps)
    room = max(most_bytes * (1 - _TABLES_SHARE), 0.0) + left
    said = []
    if len(tables) < len(steps):
        said.append(
            f"{run.name}: completions of {len(tables)} of the {len(steps)} steps that the run keeps are on this page, "
            "those with probe files and the largest measured changes first."
        )
    num_shown = _choose_rows(tables, room / (_WITH_MEASURED if run.probe_steps("entropy") else 1.0))
    number = sum(len(table.completions) for table in tables)
    if num_shown < number:
        said.append(
            f"{run.name}: the tokens of {num_shown} of these {number} completions are on this page, those that "
            "changed the entropy most (by advantage where that is unknown). Notebooks read the others."
        )
    return tables, said


def choose_step(run: Run, step: int, most_bytes: int) -> Chosen | None:
    """All of a step, or as many of its tokens as have room, those with the largest effect first; None without rows."""
    table = _table(run, step)
    if table is not None:
        _choose_rows([table], most_bytes / _WITH_MEASURED)
    return table


def _tables(run: Run, steps: list[int], room: float, gaps: Gaps) -> tuple[list[Chosen], float]:
    """The tables of steps that fit, in order of step, and the bytes left; steps are tried by [`_by_effect`]."""
    found: list[Chosen] = []
    for step in _by_effect(run, steps):
        table = gaps.attempt(f"Step {step}", run.name, _table, run, step)
        if table is None:
            continue
        completions, groups = table.completions, table.groups
        room -= _BYTES_OF_COMPLETION * len(completions) + 80 * len(groups) + _different_text(groups["prompt"])
        if room < 0:
            break
        found.append(table)
    return sorted(found, key=lambda table: table.step), max(room, 0.0)


def _table(run: Run, step: int) -> Chosen | None:
    completions = views.completions(run, step)
    return None if completions.empty else Chosen(step, views.groups(run, step, completions), completions)


def _by_effect(run: Run, steps: list[int]) -> list[int]:
    """Steps with probe files first, the newest of all, then those with the largest measured change."""
    with_files, table = set(run.probe_steps("rollouts")), run.steps
    changes = table["entropy/delta_measured"].abs() if "entropy/delta_measured" in table else pd.Series(dtype=float)
    newest = max(steps, default=0)

    def rank(step: int) -> tuple:
        return step != newest, step not in with_files, -float(np.nan_to_num(changes.get(step, 0.0))), -step

    return sorted(steps, key=rank)


def _different_text(prompts: pd.Series) -> int:
    return int(prompts.str.len().sum() - len(prompts) * len(common_ends(prompts.tolist())[0]))


def _choose_rows(tables: list[Chosen], room: float) -> int:
    """Sets the rows of each table: the completions with the largest effect that fit together. Returns their number."""
    if not tables:
        return 0
    ranked = pd.concat([
        pd.DataFrame({
            "table": number, "row": table.completions["row"], "effect": table.effects, "bytes": table.sizes,
            "tokens": table.has_tokens,
        })
        for number, table in enumerate(tables)
    ]).sort_values(["tokens", "effect"], ascending=False, kind="stable")  # fmt: skip
    kept = ranked[ranked["bytes"].cumsum() <= room]
    for number, rows in kept.groupby("table")["row"]:
        tables[int(str(number))].rows = sorted(rows.tolist())
    return len(kept)


def common_ends(texts: list[str]) -> tuple[str, str]:
    """The longest beginning and end that all of the texts share, cut so that words stay whole."""
    if len(set(texts)) < 2:
        return "", ""
    low, high = min(texts), max(texts)
    prefix = low[: _shared(low, high)]
    prefix = prefix[: max(map(prefix.rfind, " \n")) + 1]
    backward = sorted(text[::-1] for text in texts)
    most = min(_shared(backward[0], backward[-1]), min(map(len, texts)) - len(prefix))
    suffix = low[len(low) - most :]
    begins = [place for place in map(suffix.find, " \n") if place >= 0]
    return prefix, suffix[min(begins) :] if begins else ""


def _shared(first: str, second: str) -> int:
    """Number of characters that two texts have in common at their beginning."""
    for number, (one, other) in enumerate(zip(first, second, strict=False)):
        if one != other:
            return number
    return min(len(first), len(second))
