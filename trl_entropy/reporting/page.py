"""The page of one or several runs: its sections, and texts of the models, made harmless."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trl_entropy.analysis.run import Run, load_run
from trl_entropy.reporting.attribution_section import who_moved_it
from trl_entropy.reporting.figures import Figure
from trl_entropy.reporting.sections import sections_of
from trl_entropy.reporting.tables import glance_table
from trl_entropy.reporting.warnings import warnings_of

_NUM_SAMPLES, _NUM_TEXT = 4, 4000
# Control characters and direction marks: a completion must not turn the page's text around.
_UNSEEN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def render(paths: Sequence[Path]) -> tuple[str, list[Figure]]:
    """
    The page of the runs as HTML that needs no network, and its figures.

    Raises:
        ValueError: for a directory without metrics.
    """
    from jinja2 import Environment, PackageLoader

    runs = [load_run(path) for path in paths]
    for run in runs:
        if run.steps.empty:
            raise ValueError(f"{run.path} holds no metrics.jsonl with a line in it; is it a run directory?")
    sections = sections_of(runs)
    movers = [mover for run in runs if (mover := who_moved_it(run)) is not None]
    environment = Environment(loader=PackageLoader("trl_entropy.reporting"), autoescape=True)
    environment.filters["plain"] = plain
    page = environment.get_template("report.html").render(
        runs=[_about(run) for run in runs],
        glance=glance_table(runs),
        warned=[(run.name, found) for run in runs if (found := warnings_of(run.rows()))],
        sections=sections,
        movers=movers,
        dumps=[dump for run in runs for dump in _dumps(run)],
        samples=[sample for run in runs for sample in _samples(run)],
        written=time.strftime("%Y-%m-%d %H:%M"),
    )
    figures = [figure for section in sections for figure in section.figures]
    return page, [*figures, *(mover.figure for mover in movers)]


def _dumps(run: Run) -> list[dict[str, Any]]:
    """The first sample of the first evaluated prompt, token by token, of each checkpoint."""
    tokens = run.evaluation_tokens
    if tokens.empty:
        return []
    chosen = tokens[(tokens["prompt_id"] == tokens["prompt_id"].iloc[0]) & (tokens["sample"] == 0)]
    largest = chosen["entropy"].max() or 1.0
    return [
        {
            "title": f"{run.name}, step {step}: {rows['prompt_id'].iloc[0]}",
            "tokens": [
                {
                    "text": plain(row["token"]),
                    "shade": round(75 * row["entropy"] / largest),
                    "hint": f"entropy {row['entropy']:.4g}, surprisal {row['surprisal']:.4g} nats",
                }
                for row in rows.to_dict("records")
            ],
        }
        for step, rows in chosen.groupby("step")
    ]


def _samples(run: Run) -> list[dict[str, str]]:
    """A few completions of the last logged step."""
    table = run.completions
    if table.empty:
        return []
    rewards = [name for name in table if name not in ("step", "prompt", "completion", "prompt_id")]
    last = table[table["step"] == table["step"].max()]
    return [
        {
            "run": run.name,
            "rewards": ", ".join(f"{name} {_short(row[name])}" for name in rewards),
            "prompt": plain(str(row["prompt"]))[-_NUM_TEXT:],
            "completion": plain(str(row["completion"]))[:_NUM_TEXT],
        }
        for row in last.iloc[:: max(1, len(last) // _NUM_SAMPLES)].head(_NUM_SAMPLES).to_dict("records")
    ]


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float | int) else str(value)


def plain(text: str) -> str:
    """`text` without control characters and direction marks; the template escapes the rest."""
    return _UNSEEN.sub("", text)


def _about(run: Run) -> dict[str, str]:
    import yaml

    return {
        "name": run.name,
        "config_text": yaml.safe_dump(run.config, allow_unicode=True) if run.config else "not written",
        "environment_text": json.dumps(run.environment, indent=2) if run.environment else "not written",
    }
