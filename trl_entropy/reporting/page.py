"""The page of one or several runs as HTML. Texts that a model wrote are escaped and cannot change the page."""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import TypeVar

from trl_entropy.analysis.contents import steps_text
from trl_entropy.analysis.rewards import NOT_REWARDS
from trl_entropy.analysis.run import Run
from trl_entropy.reporting.attribution_section import (
    AttributionSection,
    ColouredCompletion,
    ColouredToken,
    attribution_section,
)
from trl_entropy.reporting.figures import Figure, shade
from trl_entropy.reporting.gaps import Gaps
from trl_entropy.reporting.inline import script, script_hash, style
from trl_entropy.reporting.page_data import as_text, page_blocks
from trl_entropy.reporting.sections import sections_of
from trl_entropy.reporting.tables import glance_table
from trl_entropy.reporting.warnings import RunWarning, warnings_of
from trl_entropy.runs.directory import RunDirectory
from trl_entropy.runs.strict_json import Json, Row

T = TypeVar("T")

_NUM_SAMPLES, _NUM_TEXT = 4, 4000
_ENTROPY = "213 94 0"  # orange
# Control characters and text-direction marks: a completion must not reverse the text of the page.
_UNSEEN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def render(runs: list[Run]) -> tuple[str, list[Figure]]:
    """
    The page of the runs, as one HTML text that loads nothing from a network, and the figures on it.

    A part that cannot be made, since a file is damaged or for any other reason, is left out; the page says which and
    why, and so does the log.

    Raises:
        ValueError: when a directory holds no metrics.
    """
    for run in runs:
        if run.steps.empty:
            raise ValueError(_why_no_page(run.path))
    parts, figures = _parts(runs)
    return _page(parts), figures


def render_live(names: Sequence[str], page: Json) -> str:
    """
    The page of runs that are followed, which asks its server for what is new.

    Args:
        names: of the runs.
        page: the block `page` as it is now, of [`Followed`].
    """
    from markupsafe import Markup

    blocks = [{"name": "page", "text": Markup(as_text(page))}]
    return _page({"live": True, "blocks": blocks, "runs": [{"name": name} for name in names], "gaps": page["gaps"]})


def _page(parts: Mapping[str, object]) -> str:
    from jinja2 import Environment, PackageLoader
    from markupsafe import Markup

    environment = Environment(loader=PackageLoader("trl_entropy.reporting"), autoescape=True)
    environment.filters["plain"] = plain
    template = environment.get_template("report.html")
    own = {"style": Markup(style()), "script": Markup(script()), "script_hash": script_hash()}
    return template.render({**parts, **own}, written=time.strftime("%Y-%m-%d %H:%M"))


def _why_no_page(path: Path) -> str:
    log = RunDirectory(path).metrics_path
    if log.exists() and log.stat().st_size:
        return f"{log} is damaged: none of its lines can be read, so that there is nothing to show."
    return f"{path} holds no metrics.jsonl with a line in it; is it a run directory?"


def _parts(runs: list[Run]) -> tuple[dict[str, object], list[Figure]]:
    """What the template shows, by name; parts that could not be made are named in `gaps`."""
    gaps = Gaps()
    configs = {run.name: gaps.attempt("config.yaml", run.name, _config, run) or {} for run in runs}
    sections = sections_of(runs, configs, gaps)
    attributions = _of_each(runs, gaps, "What changed the entropy", attribution_section)
    parts: dict[str, object] = {
        "blocks": _blocks(runs, configs, gaps),
        "runs": [_about(run, configs[run.name], gaps) for run in runs],
        "resumed": list(chain.from_iterable(_of_each(runs, gaps, "Where it was resumed", _resumed))),
        "glance": gaps.attempt("At a glance", ", ".join(configs), glance_table, runs),
        "warned": [found for found in _of_each(runs, gaps, "The warnings", _warned) if found[1]],
        "sections": sections,
        "attributions": attributions,
        "evaluated": list(chain.from_iterable(_of_each(runs, gaps, "Entropy token by token", _evaluated))),
        "samples": list(chain.from_iterable(_of_each(runs, gaps, "Completions of the last step", _samples))),
        "kept_completions": [sentence for sentence in map(_kept_completions, runs) if sentence],
        "no_texts": [run.name for run in runs if run.lacks_texts],
    }
    missing = [*gaps.sentences, *(sentence for run in runs for sentence in run.left_out)]
    figures = [figure for section in sections for figure in section.figures]
    return parts | {"gaps": missing}, [*figures, *_figures_of(attributions)]


def _figures_of(attributions: list[AttributionSection]) -> list[Figure]:
    of_prices = [found.price_figure for found in attributions if found.price_figure is not None]
    return [*(found.figure for found in attributions), *of_prices]


def _blocks(runs: list[Run], configs: Mapping[str, Json], gaps: Gaps) -> list[dict[str, str]]:
    """The data of the part that one clicks through: JSON without a character that HTML takes for its own."""
    from markupsafe import Markup

    return [{"name": block.name, "text": Markup(block.text)} for block in page_blocks(runs, configs, gaps)]


def _of_each(runs: list[Run], gaps: Gaps, part: str, make: Callable[[Run], T | None]) -> list[T]:
    """What `make` gives of each run, without None."""
    found = [gaps.attempt(part, run.name, make, run) for run in runs]
    return [item for item in found if item is not None]


def _warned(run: Run) -> tuple[str, list[RunWarning]]:
    return run.name, warnings_of(run.rows())


def _resumed(run: Run) -> list[str]:
    """A sentence for each time that the run was resumed with other settings."""
    return [
        f"{run.name} was resumed after step {start['after_step']} with other settings: "
        + ", ".join(f"{name} was {old} and is {new}" for name, (old, new) in start["changed"].items())
        + ". Steps before and after it are not of one run."
        for start in run.starts
        if start.get("changed")
    ]


def _evaluated(run: Run) -> list[ColouredCompletion]:
    """For each checkpoint its first sample on the first evaluated prompt, tokens coloured by their entropy."""
    chosen = {step: rows for step, rows in run.first_samples().items() if len(rows)}
    largest = max((rows["entropy"].max() for rows in chosen.values()), default=math.nan)
    return [
        ColouredCompletion(
            f"{run.name}, step {step}: {rows['prompt_id'].iloc[0]}",
            [_coloured_by_entropy(row, largest) for row in rows.to_dict("records")],
        )
        for step, rows in chosen.items()
    ]


def _coloured_by_entropy(token: Row, largest: float) -> ColouredToken:
    hint = f"entropy {token['entropy']:.4g}, surprisal {token['surprisal']:.4g} nats"
    return ColouredToken(token["token"], _ENTROPY, shade(token["entropy"], largest, 75), hint)


def _samples(run: Run) -> list[dict[str, str]]:
    """A few completions of the last step that logged some."""
    last = run.last_completions()
    rewards = [name for name in last if name not in NOT_REWARDS or name == "advantage"]
    return [
        {
            "run": run.name,
            "rewards": ", ".join(f"{name} {_short(row[name])}" for name in rewards),
            "prompt": plain(str(row["prompt"]))[-_NUM_TEXT:],
            "completion": plain(str(row["completion"]))[:_NUM_TEXT],
        }
        for row in last.iloc[:: max(1, len(last) // _NUM_SAMPLES)].head(_NUM_SAMPLES).to_dict("records")
    ]


def _kept_completions(run: Run) -> str:
    """A sentence on the steps whose completions the run still has; empty if it has none."""
    steps = run.completions_steps
    number = f"{len(steps)} step{'' if len(steps) == 1 else 's'}"
    return f"{run.name} holds tables of completions of {number}: {steps_text(steps)}." if steps else ""


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float | int) else str(value)


def plain(text: str) -> str:
    """`text` without control characters and text-direction marks; the template escapes HTML."""
    return _UNSEEN.sub("", text)


def _about(run: Run, config: Json, gaps: Gaps) -> dict[str, str]:
    import yaml

    environment = gaps.attempt("environment.json", run.name, lambda: run.environment)
    return {
        "name": run.name,
        "config_text": yaml.safe_dump(config, allow_unicode=True) if config else "not written, or not readable",
        "environment_text": json.dumps(environment, indent=2) if environment else "not written, or not readable",
    }


def _config(run: Run) -> Json:
    return run.config
