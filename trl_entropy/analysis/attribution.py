"""
What changed the entropy: a step's first-order change (T9) by token, completion, prompt and kind of token.

    run = load_run("runs/quickstart")             # a run with entropy_attribution: token
    tokens = attribution_table(run)
    shares(tokens, categories(tokens, "outcome_probability"))

Imports no torch.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd

from trl_entropy.analysis.comparison import student_t
from trl_entropy.analysis.run import Run
from trl_entropy.runs.metrics import OUTCOMES, OUTCOMES_BY_PROBABILITY, RARE

# Fixed edges of bins, so that steps and runs can be compared.
_EDGES = {
    "probability": (0.0, 0.01, 0.1, 0.5, 0.9, 0.99, 1.0),
    "pass_rate": (0.0, 0.25, 0.5, 0.75, 1.0),
}
BY = ("outcome", "outcome_probability", "probability", "entropy", "position", "length", "advantage", "pass_rate")


def attribution_table(run: Run, steps: Iterable[int] | None = None) -> pd.DataFrame:
    """
    How much each token of the steps' own completions changed the policy's entropy, to first order.

    Args:
        run: a run with `entropy_attribution: token`; with `sequence` a row is a completion and lacks the columns of a
            token.
        steps: the steps to read; by default all that have a file.

    Returns:
        A row for each completion token: `step`, `row`, `prompt_index`, `position` (0 is the first token of the
        completion), `token_id`, `token`, `attribution` (nats per token), `advantage` (T1), `reward`, `pass_rate` (mean
        reward of the prompt's group), `length` (tokens of the completion), `probability` and `entropy` (nats) under
        the policy before the step.

    Raises:
        ValueError: when the files of a step do not belong together.
    """
    steps = run.probe_steps("attribution") if steps is None else steps
    tables = [_table_of(run, step) for step in steps]
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()


def _table_of(run: Run, step: int) -> pd.DataFrame:
    given, rollouts = run.probe_file("attribution", step), run.probe_file("rollouts", step)
    if not np.array_equal(given["prompt_index"], rollouts["prompt_index"]):
        raise ValueError(
            f"step {step}: probes/attribution and probes/rollouts have different rows; are they files of two runs?"
        )
    rewards = pd.Series(rollouts["rewards"].astype(float))
    of_rows = pd.DataFrame({
        "advantage": given.get("raw_advantages", rollouts["advantages"]), "reward": rewards,
        "pass_rate": rewards.groupby(rollouts["prompt_index"]).transform("mean"),
        "length": given["completion_mask"].sum(1),
    })  # fmt: skip
    if given["attribution"].ndim == 1:
        table = pd.DataFrame({"row": of_rows.index, "prompt_index": given["prompt_index"]})
        table["attribution"] = given["attribution"].astype(float)
    else:
        table = run.tokens_in(given | {"input_ids": rollouts["input_ids"]})
        table = table.drop(columns=["loss_coefficients"])
        if "logps" in table:
            table["probability"] = np.exp(table.pop("logps").astype(float))
            table["entropy"] = table["entropy"].astype(float)
    table.insert(0, "step", step)
    return table.join(of_rows, on="row")


def categories(table: pd.DataFrame, by: str, edges: Sequence[float] | None = None) -> pd.Series:
    """
    The category of each row of an [`attribution_table`].

    Args:
        table: the rows.
        by: one of `BY`. The outcome is correct if the advantage is above 0 and incorrect if it is below; a row with
            advantage 0 has no category.
        edges: edges of the bins of a quantity, ascending. By default those of `probability` and `pass_rate` are fixed,
            and other quantities are divided at their quartiles.

    Raises:
        ValueError: when the table has no such column.
    """
    if by not in BY or (by not in table and not by.startswith("outcome")):
        raise ValueError(f"by is {by!r}: use one of {[name for name in BY if name in table or 'outcome' in name]}")
    if by in table:
        return _binned(table[by], edges or _EDGES.get(by))
    named = pd.Series(np.where(table["advantage"] > 0, *OUTCOMES), index=table.index)
    names: Sequence[str] = OUTCOMES
    if by == "outcome_probability":
        named = named + np.where(table["probability"] < RARE, "_rare", "_common")
        names = OUTCOMES_BY_PROBABILITY
    return named.where(table["advantage"] != 0).astype(pd.CategoricalDtype(list(names), ordered=True))


def _binned(values: pd.Series, edges: Sequence[float] | None) -> pd.Series:
    if edges is None:
        edges = sorted(set(values.quantile([0, 0.25, 0.5, 0.75, 1])))
    edges = [edges[0], *edges] if len(edges) == 1 else edges
    labels = [f"{low:.3g} to {high:.3g}" for low, high in itertools.pairwise(edges)]
    return pd.cut(values, list(edges), include_lowest=True, labels=labels, duplicates="drop", ordered=len(labels) > 1)


def shares(table: pd.DataFrame, category: pd.Series) -> pd.DataFrame:
    """
    Each category's share of the total change (T9); numerator and denominator are summed over steps before division.

    Args:
        table: from [`attribution_table`].
        category: the category of each row, from [`categories`] or your own; rows without one (nan) are left out.

    Returns:
        By category: `change`, nats per token and step; `share` of the total, outside [0, 1] if categories have
        opposite signs, with its 95 % interval `low`, `high` (Fieller; jackknife over prompts, with steps independent
        given the policy), which is infinite if the total is consistent with 0; `token_share`, the share of the rows.
    """
    groups = table.assign(category=category).groupby(["step", "prompt_index", "category"], observed=False)
    sums = groups["attribution"].sum().unstack("category", fill_value=0.0)
    steps = sums.groupby(level="step")
    num_prompts = steps.transform("size").to_numpy()[:, None]
    centred = (sums - steps.transform("mean")).to_numpy() * np.sqrt(num_prompts / np.maximum(num_prompts - 1, 1))
    covariance, dof = centred.T @ centred, len(sums) - len(steps)
    totals, rows = sums.sum().to_numpy(), category.value_counts().reindex(sums.columns).to_numpy()
    result = pd.DataFrame(
        {"change": totals / len(steps), "share": totals / totals.sum()},
        index=pd.Index(sums.columns, name="category"),
    )
    quantile = student_t(dof)
    result[["low", "high"]] = [
        _fieller(totals[i], totals.sum(), covariance[i, i], covariance[i].sum(), covariance.sum(), quantile)
        for i in range(len(totals))
    ]
    return result.assign(token_share=rows / rows.sum())


def _fieller(top: float, bottom: float, top_var: float, cov: float, bottom_var: float, quantile: float) -> Sequence:
    """The ratios rho with |top - rho bottom| <= quantile * stderr, as in `PooledParts.ratio_interval`."""
    a, b, c = bottom**2 - quantile**2 * bottom_var, top * bottom - quantile**2 * cov, top**2 - quantile**2 * top_var
    if np.isnan(a + b + c):
        return np.nan, np.nan
    if a <= 0:
        return -np.inf, np.inf
    half_width = np.sqrt(max(b * b - a * c, 0.0)) / a
    return b / a - half_width, b / a + half_width


def most_moving_tokens(tokens: pd.DataFrame, num: int = 20, context: int = 12) -> pd.DataFrame:
    """
    The tokens with the largest |attribution|, each with the text around it.

    Args:
        tokens: from [`attribution_table`], by token.
        num: how many.
        context: how many tokens of text on each side.

    Returns:
        The table's columns, the largest first, and `text`: the token in brackets between its neighbours.
    """
    chosen = tokens.loc[tokens["attribution"].abs().sort_values(ascending=False).index[:num]]
    completions = dict(list(tokens.groupby(["step", "row"])["token"]))
    texts = [
        _in_sentence(completions[row["step"], row["row"]].tolist(), row["position"], context)
        for row in chosen.to_dict("records")
    ]
    return chosen.assign(text=texts).reset_index(drop=True)


def _in_sentence(tokens: list[str], position: int, context: int) -> str:
    before, after = tokens[max(0, position - context) : position], tokens[position + 1 : position + 1 + context]
    left, right = "… " * (position > context), " …" * (position + 1 + context < len(tokens))
    return f"{left}{''.join(before)}[{tokens[position]}]{''.join(after)}{right}"


def ranked_prompts(run: Run, table: pd.DataFrame, num: int = 10) -> pd.DataFrame:
    """
    The prompt groups that changed the entropy most, up or down.

    Args:
        run: the run.
        table: its [`attribution_table`].
        num: how many.

    Returns:
        Largest first: `step`, `prompt_index`, `attribution` (nats per token), `pass_rate`, `prompt`.
    """
    groups = table.groupby(["step", "prompt_index"], as_index=False)
    ranked = groups.agg(attribution=("attribution", "sum"), pass_rate=("pass_rate", "first"))
    ranked = ranked.loc[ranked["attribution"].abs().sort_values(ascending=False).index[:num]].reset_index(drop=True)
    texts = [run.prompt_text(row["step"], row["prompt_index"]) for row in ranked.to_dict("records")]
    return ranked.assign(prompt=texts)
