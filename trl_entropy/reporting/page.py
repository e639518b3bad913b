"""The page of one or several runs as HTML. Texts that a model wrote are escaped and cannot change the page."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Sequence
from pathlib import Path

from trl_entropy.analysis.run import Run, load_run
from trl_entropy.reporting.attribution_section import ColouredCompletion, ColouredToken, attribution_section
from trl_entropy.reporting.figures import Figure
from trl_entropy.reporting.sections import sections_of
from trl_entropy.reporting.tables import glance_table
from trl_entropy.reporting.warnings import warnings_of
from trl_entropy.runs.strict_json import Row

_NUM_SAMPLES, _NUM_TEXT = 4, 4000
_ENTROPY = "213 94 0"  # orange
# Control characters and text-direction marks: a completion must not reverse the text of the page.
_UNSEEN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def render(paths: Sequence[Path]) -> tuple[str, list[Figure]]:
    """
    The page of the runs, as one HTML text that loads nothing from a network, and the figures on it.

    Raises:
        ValueError: when a directory holds no metrics.
    """
    from jinja2 import Environment, PackageLoader

    runs = [load_run(path) for path in paths]
    for run in runs:
        if run.steps.empty:
            raise ValueError(f"{run.path} holds no metrics.jsonl with a line in it; is it a run directory?")
    sections = sections_of(runs)
    attributions = [section for run in runs if (section := attribution_section(run)) is not None]
    environment = Environment(loader=PackageLoader("trl_entropy.reporting"), autoescape=True)
    environment.filters["plain"] = plain
    page = environment.get_template("report.html").render(
        runs=[_about(run) for run in runs],
        glance=glance_table(runs),
        warned=[(run.name, found) for run in runs if (found := warnings_of(run.rows()))],
        sections=sections,
        attributions=attributions,
        evaluated=[completion for run in runs for completion in _evaluated(run)],
        samples=[sample for run in runs for sample in _samples(run)],
        written=time.strftime("%Y-%m-%d %H:%M"),
    )
    figures = [figure for section in sections for figure in section.figures]
    return page, [*figures, *(attribution.figure for attribution in attributions)]


def _evaluated(run: Run) -> list[ColouredCompletion]:
    """For each checkpoint its first sample on the first evaluated prompt, tokens coloured by their entropy."""
    tokens = run.evaluation_tokens
    if tokens.empty:
        return []
    chosen = tokens[(tokens["prompt_id"] == tokens["prompt_id"].iloc[0]) & (tokens["sample"] == 0)]
    largest = chosen["entropy"].max() or 1.0
    return [
        ColouredCompletion(
            f"{run.name}, step {step}: {rows['prompt_id'].iloc[0]}",
            [_coloured_by_entropy(row, largest) for row in rows.to_dict("records")],
        )
        for step, rows in chosen.groupby("step")
    ]


def _coloured_by_entropy(token: Row, largest: float) -> ColouredToken:
    hint = f"entropy {token['entropy']:.4g}, surprisal {token['surprisal']:.4g} nats"
    return ColouredToken(token["token"], _ENTROPY, round(75 * token["entropy"] / largest), hint)


def _samples(run: Run) -> list[dict[str, str]]:
    """A few completions of the last step that logged some."""
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


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float | int) else str(value)


def plain(text: str) -> str:
    """`text` without control characters and text-direction marks; the template escapes HTML."""
    return _UNSEEN.sub("", text)


def _about(run: Run) -> dict[str, str]:
    import yaml

    return {
        "name": run.name,
        "config_text": yaml.safe_dump(run.config, allow_unicode=True) if run.config else "not written",
        "environment_text": json.dumps(run.environment, indent=2) if run.environment else "not written",
    }
