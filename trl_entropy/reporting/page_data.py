"""
The data of the page, written once: JSON with the runs' steps and parts, and for each step that is shown a JSON of its
own with the step's groups, completions and tokens, which the script reads when a reader goes there.

`trl_entropy.analysis.views` makes the tables, under the same names. Imports no torch.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import pandas as pd

from trl_entropy.analysis import views
from trl_entropy.analysis.comparison import differing_values, over_runs, table_of_runs
from trl_entropy.analysis.run import Run
from trl_entropy.analysis.summary import summary
from trl_entropy.analysis.view_columns import COLUMNS
from trl_entropy.reporting.columns import encoded
from trl_entropy.reporting.gaps import Gaps
from trl_entropy.reporting.selection import MOST_BYTES, Chosen, choose, common_ends
from trl_entropy.reporting.warnings import warnings_of
from trl_entropy.runs.metrics import metric_of
from trl_entropy.runs.reading import UnreadableFile
from trl_entropy.runs.strict_json import Json

FORMAT = 1
MOST_CHARACTERS = 20_000  # of one text
_BEYOND_ASCII = re.compile(r"[^ -~]")
# The settings by which completions are left out of a step, and of which the page tells.
_RULES = (
    "mask_truncated_completions", "max_completion_length", "resample_uninformative_groups", "max_resample_rounds",
)  # fmt: skip
# What is averaged over runs that differ in their seed alone.
_OVER_RUNS = (
    "entropy/policy", "entropy/delta_measured", "entropy/delta_momentum", "entropy/integral_measured", "reward",
    "reward/delta_measured", "kl", "completions/mean_length", "noise_scale/simple", "grad_norm",
)  # fmt: skip


@dataclass(frozen=True)
class Block:
    """A text of JSON on the page, and the name by which the script finds it."""

    name: str
    text: str


def page_blocks(runs: list[Run], configs: Mapping[str, Json], gaps: Gaps, most_bytes: int = MOST_BYTES) -> list[Block]:
    """
    The data of these runs as blocks of JSON: `page`, then `RUN-STEP` for each step that is shown, by the run's number.

    Args:
        runs: those on the page.
        configs: the settings of each by its name.
        gaps: gets what could not be made.
        most_bytes: of all that is not a number of a step or a part, roughly.
    """
    blocks, described = [], []
    for number, run in enumerate(runs):
        chosen, cut = gaps.attempt("The completions", run.name, choose, run, most_bytes // len(runs), gaps) or ([], [])
        shown = {}
        for table in chosen:
            step = gaps.attempt(f"Step {table.step}", run.name, step_data, run, table)
            if step is not None:
                blocks.append(Block(f"{number}-{table.step}", as_text(step)))
                shown[table.step] = f"{number}-{table.step}"
        binary = has_right_answers(chosen[-1].completions["reward"]) if chosen else False
        described.append(run_data(run, configs[run.name], gaps, shown, cut, binary))
    return [Block("page", as_text(page_data(runs, configs, gaps, described))), *blocks]


def page_data(runs: list[Run], configs: Mapping[str, Json], gaps: Gaps, described: list[Json]) -> Json:
    """The block `page`: what holds of all runs, and of each what [`run_data`] gave."""
    return {
        "format": FORMAT,
        "columns": {view: {name: list(column) for name, column in known.items()} for view, known in COLUMNS.items()},
        "metrics": _metrics(runs),
        "runs": described,
        "differences": differing_values(configs) if len(runs) > 1 else [],
        "means": gaps.attempt("The means over runs", ", ".join(configs), _means, runs, configs) or {},
    }


def as_text(value: object) -> str:
    """JSON that stands in an HTML page as text: what could end the element, or begin another, is escaped."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return _BEYOND_ASCII.sub(lambda match: match[0] if match[0].isprintable() else _escaped(match[0]), text)


def _escaped(character: str) -> str:
    """A control character or a mark of direction as JSON escapes it, so that the file itself shows what it holds."""
    return json.dumps(character)[1:-1]


def run_data(
    run: Run,
    settings: Json,
    gaps: Gaps,
    shown: Mapping[int, str],
    cut: list[str],
    binary: bool,
    only: Collection[int] | None = None,
) -> Json:
    """
    What the page holds of a run beside its completions.

    Args:
        run, settings: the run, and its settings.
        gaps: gets what could not be made.
        shown: the name of the block of each step that has one.
        cut: a sentence for each layer of completions that had to be cut.
        binary: whether rewards are 0 and 1.
        only: of these steps alone; None: of all.
    """
    name = run.name

    def of_steps(table: pd.DataFrame | None) -> pd.DataFrame:
        table = _or_none(table)
        return table if only is None else table[table["step"].isin(only)]

    sentences = gaps.attempt("The summary", name, summary, run) or []
    warnings = gaps.attempt("The warnings", name, warnings_of, run.rows()) or []
    return {
        "name": name,
        "sentences": [[sentence.text, sentence.step] for sentence in sentences],
        "warnings": [[one.title, one.text, list(one.steps), one.is_note] for one in warnings],
        "cut": cut,
        "settings": {key: settings[key] for key in _RULES if key in settings},
        "changed": _changed(run),
        "binary": binary,
        "steps": encoded("steps", of_steps(gaps.attempt("The steps", name, views.steps, run))),
        "parts": encoded("parts", of_steps(gaps.attempt("The parts of the change", name, views.parts, run))),
        "evaluation": encoded("evaluation", _or_none(gaps.attempt("The evaluations", name, views.evaluation, run))),
        "shown": {str(step): block for step, block in shown.items()},
        "tokens_known": sorted(run.probe_steps("attribution")),
    }


def _changed(run: Run) -> list[list[str]]:
    """Name, default and value of each setting that differs from its default, where the run has written them."""
    try:
        known = run.environment.get("changed_settings", {})
    except UnreadableFile:  # the part of the page that shows the file says so
        return []
    return [[name, str(values[0]), str(values[1])] for name, values in known.items()]


def _or_none(table: pd.DataFrame | None) -> pd.DataFrame:
    return pd.DataFrame({"step": []}) if table is None else table


def has_right_answers(rewards: pd.Series) -> bool:
    """Whether these rewards are all 0 or 1, so that 1 is a right answer."""
    known = rewards.dropna()
    return len(known) > 0 and bool(known.isin((0, 1)).all())


def _metrics(runs: list[Run]) -> dict[str, list[str]]:
    """Unit and meaning of each key of the runs' steps that the table of metrics knows."""
    keys = dict.fromkeys(key for run in runs for key in run.steps)
    return {key: [known.unit, known.help] for key in keys if (known := metric_of(key))}


def _means(runs: list[Run], configs: Mapping[str, Json]) -> dict[str, Json]:
    """By key: the mean over runs that differ in their seed alone, and half of its 95 % interval; none otherwise."""
    if len(runs) < 2 or not all(configs.values()):
        return {}
    steps, found = table_of_runs(runs, configs), {}
    if steps["settings"].nunique() > 1:
        return {}
    for key in (key for key in _OVER_RUNS if key in steps):
        table = over_runs(steps, key)
        table = table[table["num_runs"] > 1].reset_index()
        table["half"] = table["high"] - table["mean"]
        found[key] = encoded("steps", table[["step", "mean", "half", "num_runs"]])
    return found


def step_data(run: Run, chosen: Chosen) -> Json:
    """All that is shown of a step; `chosen.rows` are the completions whose tokens or texts are there."""
    groups = chosen.groups.assign(prompt=_shortened(chosen.groups["prompt"]))
    prefix, suffix = common_ends(groups["prompt"].tolist())
    groups["prompt"] = [text[len(prefix) : len(text) - len(suffix)] for text in groups["prompt"]]
    found: Json = {"step": chosen.step, "prompt_ends": [prefix, suffix], "groups": encoded("groups", groups)}
    completions = chosen.completions.drop(columns=["prompt"], errors="ignore")
    if not chosen.has_tokens:
        kept = completions["row"].isin(chosen.rows)
        completions["text"] = _shortened(completions["text"]).where(kept, None)
    found["completions"] = encoded("completions", completions)
    if chosen.has_tokens:
        found["tokens"] = _tokens(views.tokens(run, chosen.step, chosen.rows), "tokens")
    dropped = views.dropped(run, chosen.step)
    if len(dropped):
        found["dropped"] = encoded("dropped", _only_shown(dropped, chosen))
    if views.measured_on_rollouts(run):  # the tokens have it
        return found
    measured = views.measured_completions(run, chosen.step)
    if len(measured) and len(chosen.rows):
        most = max(len(chosen.rows) // 2, 1)
        measured = _largest(measured, most)
        rows = measured["row"].tolist()
        found["measured_completions"] = encoded(
            "measured_completions", measured.assign(prompt=_shortened(measured["prompt"]))
        )
        found["measured_tokens"] = _tokens(views.measured_tokens(run, chosen.step, rows), "measured_tokens")
    return found


def _only_shown(dropped: pd.DataFrame, chosen: Chosen) -> pd.DataFrame:
    """The table of dropped groups, whose texts are left out of a step of which no completion had room for its own."""
    if not chosen.rows:
        return dropped.drop(columns="text").drop_duplicates("group")
    return dropped.assign(prompt=_shortened(dropped["prompt"]), text=_shortened(dropped["text"]))


def _largest(measured: pd.DataFrame, most: int) -> pd.DataFrame:
    """The completions of the probe batch whose entropy changed most, `most` of them, in order."""
    if "entropy_change" not in measured:
        return measured.head(most)
    effect = (measured["entropy_change"] * measured["length"]).abs().fillna(0.0)
    return measured.loc[effect.sort_values(ascending=False).index[:most].sort_values()]


def _tokens(table: pd.DataFrame, view: str) -> Json:
    """The tokens without what the script can count: positions are 0, 1, ... in each completion."""
    dropped = table.drop(columns=["token_id", "position"], errors="ignore")
    return encoded(view, dropped)


def _shortened(texts: pd.Series) -> pd.Series:
    return texts.map(_short)


def _short(text: str) -> str:
    """The text, or its two ends with what was left out between them."""
    left_out, half = len(text) - MOST_CHARACTERS, MOST_CHARACTERS // 2
    return text if left_out <= 0 else f"{text[:half]} [… {left_out} characters left out …] {text[-half:]}"
