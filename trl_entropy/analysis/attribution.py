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
from trl_entropy.analysis.tokens import own_tokens, turns_of
from trl_entropy.runs.change_metrics import KINDS, OUTCOMES, RARE, RELATIVE_OUTCOMES, TURNS

# Fixed edges of bins, so that steps and runs can be compared.
_EDGES = {
    "probability": (0.0, 0.01, 0.1, 0.5, 0.9, 0.99, 1.0),
    "pass_rate": (0.0, 0.25, 0.5, 0.75, 1.0),
}
# A share needs a sum whose distance from 0 is more than this many half widths of its 95 % interval.
SHARE_MARGIN = 2.0
_COMPLETION_COLUMNS = (
    "step", "row", "prompt_index", "attribution", "advantage", "reward", "pass_rate", "length",
)  # fmt: skip
_SHARE_COLUMNS = ["change", "change_low", "change_high", "share", "low", "high", "token_share"]
_TOKEN_COLUMNS = ("position", "token_id", "token", "probability", "entropy")
_OUTCOME_TEXTS = {
    **{name: name for name in OUTCOMES},
    **dict(zip(RELATIVE_OUTCOMES, ("above the group's mean", "below the group's mean"), strict=True)),
    **dict(zip(TURNS, ("first turn", "second turn", "third turn", "later turns"), strict=True)),
    **dict(zip(KINDS, ("prose", "calls of tools", "arguments of calls"), strict=True)),
}
_OF_EPISODES = {"turn": TURNS, "kind": KINDS}
BY = (
    "outcome", "outcome_probability", "probability", "entropy", "position", "length", "advantage", "pass_rate",
    *_OF_EPISODES,
)  # fmt: skip


def attributed_steps(run: Run, most: int = 60, most_tokens: int = 2_000_000) -> list[int]:
    """
    Evenly spaced steps that have an attribution, the last one among them: as many as can be read at once.

    Args:
        run: the run.
        most: how many at most.
        most_tokens: how many completion tokens they have together at most, if there is more than one step.
    """
    steps, counts = run.probe_steps("attribution"), dict[int, int]()
    for stride in itertools.count(max(1, -(-len(steps) // most))):
        chosen = steps[::-stride][::-1]
        for step in chosen:
            if step not in counts:
                mask = run.probe_file("attribution", step, ["completion_mask"])["completion_mask"]
                counts[step] = int(mask.sum())
        if len(chosen) <= 1 or sum(counts[step] for step in chosen) <= most_tokens:
            return chosen
    raise AssertionError("unreachable: a stride as long as the list leaves one step")


def attribution_table(
    run: Run, steps: Iterable[int] | None = None, by_token: bool = False, context: bool = False
) -> pd.DataFrame:
    """
    How much each token of the steps' own completions changed the policy's entropy, to first order.

    Args:
        run: a run with `entropy_attribution: token`; with `sequence` a row is a completion and lacks the columns of a
            token.
        steps: the steps to read, such as [`attributed_steps`]; by default all that have a file, which in a long run
            may be more than memory holds.
        by_token: leave out steps that were attributed by completion.
        context: also the tokens of tools and environments, where there are any: a column `own` is False for these, and
            what they do not have is nan.

    Returns:
        A row for each completion token that the policy drew: `step`, `row`, `prompt_index`, `position` (0 is the first
        token of the completion), `token_id`, `token`, `attribution` (nats per token), `advantage` (T1), `reward`,
        `pass_rate` (mean reward of the prompt's group), `length` (tokens of the completion that the policy drew),
        `probability` and `entropy` (nats) under the policy before the step. With tools or an environment also `turn`
        (of `TURNS`) and `kind` (of `KINDS`), of what the token is part. With `reward_attribution` also
        `attribution_reward`, its part of the change of the expected reward (T22). A run without attribution gives the
        columns of one without tools, and no rows.

    Raises:
        ValueError: when the files of a step do not belong together.
    """
    steps = run.probe_steps("attribution") if steps is None else steps
    tables = [_table_of(run, step, context) for step in steps]
    tables = [table for table in tables if "token" in table or not by_token]
    if not tables:
        return pd.DataFrame(columns=[*_COMPLETION_COLUMNS, *_TOKEN_COLUMNS])
    return pd.concat(tables, ignore_index=True)


def _table_of(run: Run, step: int, context: bool) -> pd.DataFrame:
    given, rollouts = run.probe_file("attribution", step), run.probe_file("rollouts", step)
    if not np.array_equal(given["prompt_index"], rollouts["prompt_index"]):
        raise ValueError(
            f"step {step}: probes/attribution and probes/rollouts have different rows; are they files of two runs?"
        )
    rewards = pd.Series(rollouts["rewards"].astype(float))
    of_rows = pd.DataFrame({
        "advantage": given.get("raw_advantages", rollouts["advantages"]), "reward": rewards,
        "pass_rate": rewards.groupby(rollouts["prompt_index"]).transform("mean"),
        "length": own_tokens(given).sum(1),
    })  # fmt: skip
    if given["attribution"].ndim == 1:
        table = pd.DataFrame({"row": of_rows.index, "prompt_index": given["prompt_index"]})
        for name in ("attribution", "attribution_reward"):
            if name in given:
                table[name] = given[name].astype(float)
    else:
        of_tools = {"turn": turns_of(own_tokens(given))} if "kind" in given else {}
        table = run.tokens_in(given | of_tools | {"input_ids": rollouts["input_ids"]}, context and bool(of_tools))
        for name, names in _OF_EPISODES.items() if of_tools else ():
            table[name] = np.append(names, None)[table[name].fillna(len(names)).clip(upper=len(names) - 1).astype(int)]
        table = table.drop(columns=["loss_coefficients"]).astype({"attribution": float})
        if "logps" in table:
            table["probability"] = np.exp(np.minimum(table.pop("logps").astype(float), 0.0))  # rounding above 0
            table["entropy"] = table["entropy"].astype(float)
    table.insert(0, "step", step)
    return table.join(of_rows, on="row")


def own_rows(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of an [`attribution_table`] but for the tokens of tools and environments."""
    return table[table["own"].astype(bool)].reset_index(drop=True) if "own" in table else table


def categories(table: pd.DataFrame, by: str, edges: Sequence[float] | None = None) -> pd.Series:
    """
    The category of each row of an [`attribution_table`].

    Args:
        table: the rows.
        by: one of `BY`. The outcome says whether the advantage is above or below 0, and a row with advantage 0 has no
            category; it is called `correct` or `incorrect` if all rewards are 0 or 1, else `above_mean` or
            `below_mean`: the reward is above or below the group's mean ([`outcome_text`]).
        edges: edges of the bins of a quantity, ascending; what lies outside has a bin of its own. By default those of
            `probability`, and of `pass_rate` if all rewards are 0 or 1, are fixed, and other quantities are divided at
            their quartiles.

    Raises:
        ValueError: when the table has no such column.
    """
    if by not in BY or (by not in table and not by.startswith("outcome")):
        raise ValueError(f"by is {by!r}: use one of {[name for name in BY if name in table or 'outcome' in name]}")
    if by in table and by in _OF_EPISODES:
        found = set(table[by].dropna())
        present = [name for name in _OF_EPISODES[by] if name in found]
        return table[by].astype(pd.CategoricalDtype(present, ordered=True))
    if by in table:
        fixed = None if by == "pass_rate" and not has_right_answers(table) else _EDGES.get(by)
        return _binned(table[by], edges or fixed)
    names: Sequence[str] = OUTCOMES if has_right_answers(table) else RELATIVE_OUTCOMES
    codes = np.where(table["advantage"] > 0, 0, 1)
    if by == "outcome_probability":
        codes = 2 * codes + np.where(table["probability"] < RARE, 0, 1)
        names = [f"{name}_{rarity}" for name in names for rarity in ("rare", "common")]
    codes = np.where(table["advantage"].ne(0), codes, -1)
    return pd.Series(pd.Categorical.from_codes(codes, list(names), ordered=True), index=table.index)


def has_right_answers(table: pd.DataFrame) -> bool:
    """Whether all rewards of an [`attribution_table`] are 0 or 1, so that 1 means a right answer."""
    return "reward" in table and bool(table["reward"].isin((0, 1)).all())


def outcome_text(name: object) -> str:
    """The category in words: `above_mean_rare` is "above the group's mean, rare"; other names stay as they are."""
    outcome, _, rarity = str(name).rpartition("_")
    if str(name) in _OUTCOME_TEXTS:
        return _OUTCOME_TEXTS[str(name)]
    return f"{_OUTCOME_TEXTS[outcome]}, {rarity}" if outcome in _OUTCOME_TEXTS else str(name)


def _binned(values: pd.Series, edges: Sequence[float] | None) -> pd.Series:
    """Bins from edge to edge that hold every value: the lowest holds its lower edge, and each its upper one."""
    known = values.dropna().astype(float)
    if known.empty:
        return pd.Series(pd.NA, index=values.index).astype(pd.CategoricalDtype([], ordered=True))
    ends = sorted(set(known.quantile([0, 0.25, 0.5, 0.75, 1])) if edges is None else set(edges))
    texts = _edge_texts(ends)
    labels = [f"{low} to {high}" for low, high in itertools.pairwise(texts)] or texts
    below, above = bool((known < ends[0]).any()), bool((known > ends[-1]).any())
    labels = [f"below {texts[0]}"] * below + labels + [f"above {texts[-1]}"] * above
    codes = below + np.searchsorted(ends[1:-1], values.astype(float), side="left")
    codes = np.where(values < ends[0], 0, np.where(values > ends[-1], len(labels) - 1, codes))
    codes = np.where(values.isna(), -1, codes)
    return pd.Series(pd.Categorical.from_codes(codes, labels, ordered=True), index=values.index)


def _edge_texts(edges: Sequence[float]) -> list[str]:
    """The edges with as few digits as tell them apart."""
    for digits in range(3, 18):
        texts = [f"{edge:.0f}" if edge == round(edge) and abs(edge) < 1e6 else f"{edge:.{digits}g}" for edge in edges]
        if len(set(texts)) == len(texts):
            break
    return texts


def shares(table: pd.DataFrame, category: pd.Series) -> pd.DataFrame:
    """
    What each category adds to the change (T9), and its share of the sum; both are summed over steps before division.

    Args:
        table: from [`attribution_table`].
        category: the category of each row, from [`categories`] or your own; rows without one (nan) are left out.

    Returns:
        By category: `change`, nats per token and step, with its 95 % interval `change_low`, `change_high` (Student's
        t, over prompts, with steps independent given the policy); `share` of the sum, outside [0, 1] if categories
        have opposite signs, with its 95 % interval `low`, `high` (Fieller); `token_share`, the share of the rows.
        Shares are nan unless [`is_well_away`] holds of the sum: where parts cancel, a share says nothing.
    """
    if table.empty:
        return pd.DataFrame(columns=_SHARE_COLUMNS, dtype=float)
    sums = _prompt_sums(table, category)
    num_steps, totals = max(1, sums.index.get_level_values("step").nunique()), sums.sum(skipna=False).to_numpy()
    deviations = _deviations(sums)
    half = _half_widths(deviations).to_numpy() / num_steps
    result = pd.DataFrame({"change": totals / num_steps}, index=pd.Index(sums.columns, name="category"))
    result = result.assign(change_low=result["change"] - half, change_high=result["change"] + half)
    whole = float(totals.sum())
    result[["share", "low", "high"]] = np.nan
    of_whole = deviations.sum(axis=1, skipna=False)
    if is_well_away(whole, float(_half_widths(of_whole.to_frame()).iloc[0])):
        result["share"] = totals / whole
        result[["low", "high"]] = [
            _share_interval(top, whole, deviations[name], of_whole)
            for name, top in zip(sums, totals.tolist(), strict=True)
        ]
    rows = category.value_counts().reindex(sums.columns).fillna(0).to_numpy()
    return result.assign(token_share=rows / max(rows.sum(), 1))


def prices(table: pd.DataFrame, category: pd.Series) -> pd.DataFrame:
    """
    What each category paid in entropy for what it earned in reward (T22), summed over steps before division.

    Args:
        table: from [`attribution_table`], of a run with `reward_attribution`.
        category: as for [`shares`].

    Returns:
        By category and of `all`: `lost`, nats per token and step (minus its part of the entropy's change), and
        `earned`, its part of the change of the expected reward, each with `_low` and `_high` of its 95 % interval;
        `price`, their ratio, with `low` and `high` (Fieller; infinite where `earned` is consistent with 0).
    """
    lost, earned = -_prompt_sums(table, category), _prompt_sums(table, category, "attribution_reward")
    num_steps = max(1, lost.index.get_level_values("step").nunique())
    rows = {}
    for name in [*lost.columns, "all"]:
        pair = [sums.sum(axis=1) if name == "all" else sums[name] for sums in (lost, earned)]
        deviations = _deviations(pd.DataFrame(dict(zip(("lost", "earned"), pair, strict=True))))
        half, row = _half_widths(deviations), dict[str, float]()
        for what, sums in zip(("lost", "earned"), pair, strict=True):
            middle, width = sums.sum() / num_steps, half[what] / num_steps
            row |= {what: middle, f"{what}_low": middle - width, f"{what}_high": middle + width}
        low, high = _share_interval(pair[0].sum(), pair[1].sum(), deviations["lost"], deviations["earned"])
        rows[name] = row | {"price": np.divide(row["lost"], row["earned"]), "low": low, "high": high}
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("category")


def is_well_away(value: float, half_width: float) -> bool:
    """Whether a sum is so far from 0, in half widths of its 95 % interval, that shares of it say something."""
    return abs(value) > SHARE_MARGIN * half_width


def _prompt_sums(table: pd.DataFrame, category: pd.Series, of: str = "attribution") -> pd.DataFrame:
    """The sum of each prompt (rows) by category (columns): 0 where it has no such rows, nan where one is nan."""
    names = category.cat.categories if isinstance(category.dtype, pd.CategoricalDtype) else sorted(category.unique())
    prompts = table.groupby(["step", "prompt_index"]).size().index
    groups = table.assign(category=category).groupby(["step", "prompt_index", "category"], observed=True)
    found = groups[of].agg(["sum", "size", "count"])
    sums = found["sum"].where(found["size"] == found["count"]).unstack("category")
    present = found["size"].unstack("category").notna()
    return sums.where(present, 0.0).reindex(index=prompts, columns=list(names), fill_value=0.0).astype(float)


def _deviations(sums: pd.DataFrame) -> pd.DataFrame:
    """
    The sums' deviations from their step's mean, scaled so that their squares add up to the variance of the totals,
    steps and prompts independent; nan in a step of one prompt.
    """
    steps = sums.groupby(level="step")
    num_prompts = steps.transform("size").astype(float)
    return (sums - steps.transform("mean")).mul((num_prompts / (num_prompts - 1)) ** 0.5, axis=0)


def _dofs(deviations: pd.DataFrame) -> pd.Series:
    """By column the degrees of freedom of the variance of its sum (Satterthwaite, as `PooledParts.dof`)."""
    steps = deviations.pow(2).groupby(level="step")
    variances, dofs = steps.sum(), steps.size() - 1
    found = variances.sum() ** 2 / variances.pow(2).div(dofs, axis=0).sum()
    return found.clip(dofs.min(), dofs.sum()).fillna(dofs.sum())


def _half_widths(deviations: pd.DataFrame) -> pd.Series:
    """By column half of the 95 % interval of the sum whose prompts deviate so; nan if one is."""
    return _dofs(deviations).map(student_t) * deviations.pow(2).sum(skipna=False) ** 0.5


def _share_interval(top: float, bottom: float, of_top: pd.Series, of_bottom: pd.Series) -> Sequence[float]:
    """Fieller's interval of a ratio of two sums with these deviations, as `PooledParts.ratio_interval`."""
    combined = pd.DataFrame({"top": of_top, "bottom": of_bottom, "ratio": of_top - top / bottom * of_bottom})
    products = of_top * of_top, of_top * of_bottom, of_bottom * of_bottom
    top_variance, covariance, bottom_variance = (float(product.sum()) for product in products)
    return _fieller(top, bottom, top_variance, covariance, bottom_variance, student_t(_dofs(combined).min()))


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
    completions = tokens.groupby(["step", "row"])[["position", "token"]]
    texts = [
        _in_sentence(completions.get_group((row["step"], row["row"])), row["position"], context)
        for row in chosen.to_dict("records")
    ]
    return chosen.assign(text=texts).reset_index(drop=True)


def _in_sentence(completion: pd.DataFrame, position: int, context: int) -> str:
    tokens, position = completion["token"].tolist(), completion["position"].tolist().index(position)
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
