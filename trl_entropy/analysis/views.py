"""
The tables behind the views of the page, under the names that the page gives them; `COLUMNS` says what each holds.

    run = load_run("runs/quickstart")
    view(run, "groups", step=15).sort_values("change")
    view(run, "tokens", step=15, rows=[40])

A step is seen twice: by the completions that it was trained on (`groups`, `completions`, `tokens`), and by those of
the probe batch on which its change was measured (`measured_completions`, `measured_tokens`). Imports no torch.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import pandas as pd

from trl_entropy.analysis.attribution import is_well_away
from trl_entropy.analysis.comparison import student_t
from trl_entropy.analysis.empty_views import why_empty
from trl_entropy.analysis.rewards import ROUND, reward_columns, reward_table
from trl_entropy.analysis.run import Run
from trl_entropy.analysis.tokens import ends_of, own_tokens, token_table, turns_of
from trl_entropy.analysis.view_columns import COLUMNS
from trl_entropy.runs.change_metrics import KINDS, PARTS
from trl_entropy.runs.reading import UnreadableFile
from trl_entropy.runs.step_files import completions_steps
from trl_entropy.runs.strict_json import Json, Row

logger = logging.getLogger(__name__)

Arrays = Mapping[str, np.ndarray]
Columns = dict[str, np.ndarray]


def view(run: Run, name: str, step: int | None = None, rows: Iterable[int] | None = None) -> pd.DataFrame:
    """
    The table of one view; columns that the run's files do not have are left out. A table without rows is returned
    with a warning that says what it needs.

    Args:
        run: the run.
        name: one of `COLUMNS`.
        step: of which step; not for `steps`, `parts` and `evaluation`, which have all of them.
        rows: of these completions alone, by their `row`; for tables of tokens.

    Raises:
        ValueError: when there is no such view, or the view needs a step.
    """
    table = _table(run, name, step, rows)
    if table.empty:
        logger.warning("%s", why_empty(run, name, step))
    return table


def _table(run: Run, name: str, step: int | None, rows: Iterable[int] | None) -> pd.DataFrame:
    if name in _OF_THE_RUN:
        return _OF_THE_RUN[name](run)
    if name not in COLUMNS or step is None:
        raise ValueError(
            f"view is {name!r}, step {step}: use one of {list(COLUMNS)}, with a step but for the first three"
        )
    if name in ("tokens", "measured_tokens"):
        return (tokens if name == "tokens" else measured_tokens)(run, step, rows)
    return _OF_A_STEP[name](run, step)


def last_view(run: Run, name: str) -> pd.DataFrame:
    """The [`view`] of the newest step that has it; without rows if none has. `name` is one that needs a step."""
    if name == "dropped":
        known = completions_steps(run.path, "dropped")
    elif name in ("groups", "completions"):
        known = steps_with_completions(run)
    else:
        known = run.probe_steps("entropy" if name.startswith("measured") else "rollouts")
    return view(run, name, known[-1]) if known else pd.DataFrame(columns=list(COLUMNS[name]))


def steps(run: Run) -> pd.DataFrame:
    """A row for each step: `step`, and every number of `metrics.jsonl` by its key."""
    return run.steps.select_dtypes("number").reset_index()


def parts(run: Run) -> pd.DataFrame:
    """
    What the measured change of a step is made of, a row for each part: `step`, `part`, `change` in nats per token.

    Momentum, weight decay, gradient, ... are those of (T9), and `rounding` is the rest, so that they sum to
    `entropy/delta_linear`; `curvature` is the measured change less the first-order one, so that all of them sum to
    `entropy/delta_measured`.
    """
    table, found = run.steps, []
    for row in run.rows("entropy/delta_linear"):
        known = {name: row[f"entropy/delta_{name}"] for name in PARTS if row.get(f"entropy/delta_{name}") is not None}
        if not known:
            continue
        linear = row["entropy/delta_linear"]
        known["rounding"] = linear - sum(known.values())
        if row.get("entropy/delta_measured") is not None:
            known["curvature"] = row["entropy/delta_measured"] - linear
        found += [{"step": row["step"], "part": name, "change": value} for name, value in known.items()]
    return pd.DataFrame(found, columns=["step", "part", "change"]).astype({"step": table.index.dtype})


def evaluation(run: Run) -> pd.DataFrame:
    """
    What was measured on held-out prompts, a row for each number: `step`, `source`, `metric`, `value`, and the ends
    `low` and `high` of its 95 % interval, which `trl-entropy evaluate` alone gives.
    """
    names = ["step", "source", "metric", "value", "low", "high"]
    found = [
        {"step": row["step"], "source": _source(row), "metric": name, "value": value}
        for row in run.training_evaluation_rows
        for name, value in row.items()
        if name not in ("step", "dataset") and isinstance(value, int | float)
    ]
    checkpoints = run.evaluation.drop(columns="unit").assign(source="evaluate")
    table = pd.concat([pd.DataFrame(found, columns=names), checkpoints[names]], ignore_index=True)
    return table.astype({"step": int, "value": float, "low": float, "high": float})


def _source(row: Row) -> str:
    return f"training, {row['dataset']}" if "dataset" in row else "training"


def steps_with_completions(run: Run) -> list[int]:
    """The steps of which `groups` and `completions` have rows: those with probe files, and those with TRL's table."""
    return sorted({*run.probe_steps("rollouts"), *run.completions_steps}.difference(_only_evaluated(run)))


def _only_evaluated(run: Run) -> set[int]:
    """The steps whose table an evaluation has replaced, in runs of earlier versions, which had no tables for both."""
    if completions_steps(run.path, "evaluation"):
        return set()
    return {int(step) for step in run.training_evaluation.index}.difference(run.probe_steps("rollouts"))


def completions(run: Run, step: int) -> pd.DataFrame:
    """The completions that a step was trained on, a row for each; `COLUMNS["completions"]` says what they have."""
    if step not in run.probe_steps("rollouts"):
        return _logged_completions(run, step)
    arrays = _trained(run, step)
    own = own_tokens(arrays)
    mask: np.ndarray = arrays["completion_mask"].astype(bool)
    table = pd.DataFrame({
        "row": np.arange(len(own)), "prompt_index": arrays["prompt_index"],
        "reward": arrays["rewards"].astype(float),
        "advantage": arrays.get("raw_advantages", arrays["advantages"]).astype(float),
    })  # fmt: skip
    if "attribution" in arrays:
        table["change"] = arrays["attribution"].astype(float).reshape(len(own), -1).sum(axis=1)
    if "entropy" in arrays:
        table["entropy"], table["surprisal"] = _means(arrays["entropy"], own), -_means(arrays["logps"], own)
    for name, values in _changes(run, step, arrays, own).items():
        table[name] = values
    table["length"] = own.sum(axis=1)
    if not np.array_equal(own, mask):
        table["context_length"], table["turns"] = (mask & ~own).sum(axis=1), turns_of(own).max(axis=1, initial=-1) + 1
    table["end"] = ends_of(_config(run), arrays["input_ids"][:, -mask.shape[1] :], mask, own)
    return table.join(reward_table(run, step, arrays))


def _changes(run: Run, step: int, arrays: Arrays, own: np.ndarray) -> Columns:
    """What the step changed on its own completions, as far as a probe has measured it on them."""
    if "logps_after" in arrays:
        logps, entropy = (arrays[f"{key}_after"] - arrays[f"{key}_before"] for key in ("logps", "entropy"))
        return {"logp_change": np.where(own, logps, 0.0).sum(axis=1), "entropy_change": _means(entropy, own)}
    if step not in run.probe_steps("fisher"):
        return {}
    given = run.probe_file("fisher", step, ("rows", "logps_change_measured"))
    found = np.full(len(own), np.nan)
    found[given["rows"]] = given["logps_change_measured"]
    return {"logp_change": found}


def groups(run: Run, step: int, table: pd.DataFrame | None = None) -> pd.DataFrame:
    """
    The prompt groups of a step, a row for each, in the order of their rows.

    Args:
        run: the run.
        step: the step.
        table: its [`completions`], which are read if they are not given.
    """
    table = completions(run, step) if table is None else table
    codes, prompts = pd.factorize(table["prompt_index"])

    def sums(values: pd.Series | np.ndarray) -> np.ndarray:
        return np.bincount(codes, np.asarray(values, dtype=float), len(prompts))

    def stddevs(values: pd.Series) -> np.ndarray:
        left = np.where(counts > 1, counts - 1, np.nan)
        return np.sqrt(sums((values - (sums(values) / counts)[codes]) ** 2) / left)

    counts = np.bincount(codes, minlength=len(prompts))
    found = pd.DataFrame({"prompt_index": prompts, "num_completions": counts})
    found["reward_mean"], found["reward_std"] = sums(table["reward"]) / counts, stddevs(table["reward"])
    if "length" in table:
        found["length_mean"] = sums(table["length"]) / counts
    if "entropy" in table:
        found["entropy"] = sums((table["entropy"] * table["length"]).fillna(0.0)) / sums(table["length"])
    if "change" in table:
        found["change"], found["change_stderr"] = sums(table["change"]), stddevs(table["change"]) * counts**0.5
        found["share"] = _shares(found["change"])
    found["num_truncated"] = sums(table["end"] == "truncated").astype(int)
    found["signal"] = np.where(sums(table["advantage"] != 0) > 0, "yes", "no")
    if "round" in table:
        found["round"] = table.groupby(codes)["round"].max()
    return found.assign(prompt=_prompts(run, step, table))


def dropped(run: Run, step: int) -> pd.DataFrame:
    """The completions of the groups that were drawn for a step and not trained on, and by what rule (`"rule"`)."""
    if step not in completions_steps(run.path, "dropped"):
        return pd.DataFrame(columns=["group", "round", "rule", "reward", "prompt", "text"])
    logged = run.completions_of(step, "dropped")
    if logged is None:
        return pd.DataFrame(columns=["group", "round", "rule", "reward", "prompt", "text"])
    rewards = reward_columns(logged)
    table = pd.DataFrame({
        "group": logged["group"], "round": logged[ROUND], "rule": logged["rule"],
        "reward": _weighted(run, rewards), "prompt": logged["prompt"].map(str), "text": logged["completion"].map(str),
    })  # fmt: skip
    return table.join(rewards)


def _weighted(run: Run, rewards: pd.DataFrame) -> pd.Series:
    """The sum of the reward functions with the run's weights; nan where their number is not that of the weights."""
    weights = _config(run).get("reward_weights") or [1.0] * rewards.shape[1]
    if len(weights) != rewards.shape[1]:
        return pd.Series(np.nan, index=rewards.index)
    return (rewards * weights).sum(axis=1, min_count=1)


def tokens(run: Run, step: int, rows: Iterable[int] | None = None) -> pd.DataFrame:
    """The tokens of the completions that a step was trained on, those of tools and environments among them."""
    if step not in run.probe_steps("rollouts"):
        return pd.DataFrame(columns=["row", "position", "token"])
    arrays = _of_rows(_trained(run, step), rows)
    names = {"attribution": "change", "entropy": "entropy", "logps": "logp", "loss_coefficients": "weight"}
    own = own_tokens(arrays)
    taken: Columns = {
        new: arrays[old].astype(float) for old, new in names.items() if old in arrays and arrays[old].ndim == 2
    }
    for name, key in (("logp_change", "logps"), ("entropy_change", "entropy")):
        if f"{key}_after" in arrays:
            taken[name] = arrays[f"{key}_after"].astype(float) - arrays[f"{key}_before"].astype(float)
    if "kind" in arrays:
        taken["kind"], taken["turn"] = arrays["kind"], turns_of(own) + 1
    table = _token_rows(run, arrays, taken)
    if "kind" in table:
        words = [*(name.removeprefix("kind_") for name in KINDS), None]
        table["kind"] = [words[int(code)] for code in table["kind"].fillna(len(KINDS)).clip(upper=len(KINDS))]
    return table


def measured_completions(run: Run, step: int) -> pd.DataFrame:
    """The completions of the probe batch, on which a step's change was measured, a row for each."""
    if step not in run.probe_steps("entropy"):
        return pd.DataFrame(columns=["row", "prompt_index"])
    arrays = run.probe_file("entropy", step)
    own = own_tokens(arrays)
    found = {"row": np.arange(len(own)), "prompt_index": arrays["prompt_index"], "length": own.sum(axis=1)}
    if "entropy_before" in arrays:
        found["entropy"] = _means(arrays["entropy_before"], own)
        found["entropy_change"] = _means(arrays["entropy_after"] - arrays["entropy_before"], own)
        found["logp_change"] = np.where(own, arrays["logps_after"] - arrays["logps_before"], 0.0).sum(axis=1)
    table = pd.DataFrame(found)
    width = own.shape[1]
    return table.assign(prompt=_texts_of_prompts(run, arrays, width, table.index))


def measured_tokens(run: Run, step: int, rows: Iterable[int] | None = None) -> pd.DataFrame:
    """The tokens of the probe batch with entropy and log-probability before the step, and their changes by it."""
    if step not in run.probe_steps("entropy"):
        return pd.DataFrame(columns=["row", "position", "token"])
    arrays = _of_rows(run.probe_file("entropy", step), rows)
    taken: Columns = {}
    if "entropy_before" in arrays:
        for name, key in (("entropy", "entropy"), ("logp", "logps")):
            before: np.ndarray = arrays[f"{key}_before"].astype(float)
            taken |= {name: before, f"{name}_change": arrays[f"{key}_after"].astype(float) - before}
    return _token_rows(run, arrays, taken)


# ---- the steps of these


def _trained(run: Run, step: int) -> dict[str, np.ndarray]:
    """The arrays of the step's own completions, with those of the attribution if it has one."""
    arrays = run.probe_file("rollouts", step)
    if step in run.probe_steps("attribution"):
        given = run.probe_file("attribution", step)
        if not np.array_equal(given["prompt_index"], arrays["prompt_index"]):
            raise ValueError(
                f"step {step}: probes/attribution and probes/rollouts have different rows; are they files of two runs?"
            )
        arrays |= given
    return arrays | _scores_of_rollouts(run, step, arrays)


def measured_on_rollouts(run: Run) -> bool:
    """Whether the entropy probe measures on the completions that the step is trained on."""
    return bool(_config(run).get("entropy_probe_completions") == "rollouts")


def _scores_of_rollouts(run: Run, step: int, arrays: Arrays) -> dict[str, np.ndarray]:
    """Log-probabilities and entropies before and after the step, if they were measured on these very rows."""
    probes = [*["entropy"] * measured_on_rollouts(run), "likelihood"]
    probe = next((probe for probe in probes if step in run.probe_steps(probe)), None)
    if probe is None:
        return {}
    given = run.probe_file(probe, step)
    same = all(np.array_equal(given[name], arrays[name]) for name in ("prompt_index", "completion_mask"))
    kept = ("logps_before", "logps_after", "entropy_before", "entropy_after")
    return {name: given[name] for name in kept if name in given} if same else {}


def _of_rows(arrays: Arrays, rows: Iterable[int] | None) -> dict[str, np.ndarray]:
    """The arrays of these rows, in this order, with the rows' own numbers in `row`."""
    chosen = np.arange(len(arrays["prompt_index"])) if rows is None else np.array([*rows], dtype=int)
    return {name: array[chosen] for name, array in arrays.items()} | {"row": chosen}


def _token_rows(run: Run, arrays: Arrays, taken: Columns) -> pd.DataFrame:
    """The table of tokens with these (B, T) columns, nan where a tool or an environment wrote; `own` if one did."""
    base = {
        name: arrays[name] for name in ("input_ids", "completion_mask", "loss_mask", "prompt_index") if name in arrays
    }
    table = token_table(base | taken, context=True).drop(columns="prompt_index")
    table["row"] = arrays["row"][table["row"].to_numpy()]
    table.insert(3, "token", run.texts_of(table["token_id"]))
    own = table.pop("own").astype(bool)
    return table.drop(columns="attention_mask", errors="ignore").assign(**({} if own.all() else {"own": own}))


def _means(values: np.ndarray, own: np.ndarray) -> np.ndarray:
    """The mean of each row over the policy's tokens; nan where it has none."""
    counts = own.sum(axis=1)
    return np.where(own, values.astype(float), 0.0).sum(axis=1) / np.where(counts, counts, np.nan)


def _config(run: Run) -> Json:
    """The run's settings; none if the file is damaged, which whoever shows the settings says."""
    try:
        return run.config
    except UnreadableFile:
        return {}


def _shares(change: pd.Series) -> pd.Series:
    """Each group's share of their sum; nan unless [`is_well_away`] holds of the sum."""
    half = student_t(len(change) - 1) * change.std() * len(change) ** 0.5
    total = float(change.sum())
    return change / total if is_well_away(total, float(half)) else change * np.nan


def _prompts(run: Run, step: int, table: pd.DataFrame) -> list[str]:
    """The text of each group's prompt, in the order of the groups."""
    first = table.drop_duplicates("prompt_index")
    if "text" in table or table.empty:
        return [] if table.empty else first["prompt"].tolist()
    arrays = run.probe_file("rollouts", step, ("input_ids", "attention_mask", "completion_mask"))
    return _texts_of_prompts(run, arrays, arrays["completion_mask"].shape[1], first["row"])


def _texts_of_prompts(run: Run, arrays: Arrays, width: int, rows: Sequence[int] | pd.Index | pd.Series) -> list[str]:
    """The text of the prompt of each of these rows, whose completions have `width` columns."""
    ids = arrays["input_ids"][:, :-width]
    kept: np.ndarray = arrays["attention_mask"][:, :-width].astype(bool)
    chosen = [ids[row][kept[row]] for row in rows]
    known = np.unique(np.concatenate(chosen)) if chosen else np.empty(0, dtype=int)
    by_id = dict(zip(known.tolist(), run.texts_of(pd.Series(known)), strict=True))
    return ["".join(by_id[token] for token in row.tolist()) for row in chosen]


def _logged_completions(run: Run, step: int) -> pd.DataFrame:
    """The completions of a step of which no probe has a file, from TRL's table: texts instead of tokens."""
    logged = run.completions_of(step)
    if logged is None:
        return pd.DataFrame(columns=["row", "prompt_index", "reward", "advantage", "end"])
    prompts, rewards = logged["prompt"].map(str), reward_columns(logged)
    table = pd.DataFrame({
        "row": np.arange(len(logged)), "prompt_index": (prompts != prompts.shift()).cumsum() - 1,
        "reward": _weighted(run, rewards), "advantage": logged.get("advantage", np.nan), "end": "unknown",
    })  # fmt: skip
    if ROUND in logged:
        table["round"] = logged[ROUND]
    return table.join(rewards).assign(prompt=prompts, text=logged["completion"].map(str))


_OF_THE_RUN = {"steps": steps, "parts": parts, "evaluation": evaluation}
_OF_A_STEP: dict[str, Callable[[Run, int], pd.DataFrame]] = {
    "groups": groups, "completions": completions, "dropped": dropped, "measured_completions": measured_completions,
}  # fmt: skip
