"""The numbers of one checkpoint from its completions: per prompt, per token position, and over all."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import numpy as np
import pandas as pd
import torch

from trl_entropy.estimators.statistics.over_prompts import ratio_intervals, share_intervals
from trl_entropy.estimators.statistics.pass_at_k import pass_at_k, powers_of_two_up_to
from trl_entropy.runs.directory import Measured
from trl_entropy.tasks.answers import UNDECIDED

Metrics = dict[str, Measured]
Column = pd.Series | np.ndarray


def prompt_table(records: pd.DataFrame, functions: Mapping[str, str] = MappingProxyType({})) -> pd.DataFrame:
    """
    A row for each prompt: counts and sums over its samples, whether the greedy completion is correct, and pass@k.

    Args:
        records: a row for each completion, as the worker writes them; every prompt has the same number of samples.
        functions: name of a metric, `rewards/NAME` or `metrics/NAME`, -> its column in `records`. Its sum over the
            samples that have a value, and how many they are, are the columns `METRIC/sum` and `METRIC/num`.

    Raises:
        ValueError: when prompts have different numbers of samples.
    """
    sampled = records[~records["greedy"]]
    table = _counts_and_sums(sampled)
    for metric, column in functions.items():
        by_prompt = sampled.groupby("prompt_id", sort=False, observed=True)[column]
        table[f"{metric}/sum"], table[f"{metric}/num"] = by_prompt.sum(), by_prompt.count()
    greedy = records[records["greedy"]].set_index("prompt_id")["correct"]
    table["greedy_correct"] = greedy.reindex(table.index).astype(bool)
    num_samples = _equal(table["num_samples"])
    for k in powers_of_two_up_to(num_samples):
        correct = torch.tensor(table["num_correct"].to_numpy())
        table[f"pass@{k}"] = pass_at_k(correct, num_samples, k).numpy()
    return table.reset_index()


def _counts_and_sums(samples: pd.DataFrame) -> pd.DataFrame:
    sampled = samples.assign(
        entropy_sum=lambda rows: rows["entropies"].map(np.sum),
        surprisal_sum=lambda rows: -rows["logps"].map(np.sum),
        correct_length=lambda rows: rows["length"].where(rows["correct"]),
        undecided=lambda rows: rows["verdict"].isin([verdict.value for verdict in UNDECIDED]),
    )
    return sampled.groupby("prompt_id", sort=False, observed=True).agg(
        num_samples=("sample", "size"),
        num_correct=("correct", "sum"),
        num_answer_tags=("answer_tags", "sum"),
        num_well_formed=("well_formed", "sum"),
        num_undecided=("undecided", "sum"),
        num_clipped=("clipped", "sum"),
        num_tokens=("length", "sum"),
        entropy_sum=("entropy_sum", "sum"),
        surprisal_sum=("surprisal_sum", "sum"),
        distinct_answers=("extracted", "nunique"),
        max_correct_length=("correct_length", "max"),
    )


def _equal(counts: pd.Series) -> int:
    if counts.nunique() != 1:
        raise ValueError(f"prompts have different numbers of samples: {sorted(counts.unique())}")
    return int(counts.iloc[0])


def position_table(records: pd.DataFrame) -> pd.DataFrame:
    """
    A row for each token position (0 is the first): mean entropy and surprisal of the samples that reach it.

    The columns are `position`, `num_tokens`, and `entropy` and `surprisal` with their 95 % intervals over prompts.
    """
    sampled = records[~records["greedy"]]
    codes, _ = pd.factorize(sampled["prompt_id"])
    sums = {name: np.zeros((codes.max() + 1, int(sampled["length"].max()))) for name in ("tokens", "entropy", "logps")}
    for prompt, entropies, logps in zip(codes, sampled["entropies"], sampled["logps"], strict=True):
        sums["tokens"][prompt, : len(logps)] += 1
        sums["entropy"][prompt, : len(logps)] += entropies
        sums["logps"][prompt, : len(logps)] += logps
    num_tokens = sums["tokens"].sum(0)
    table = pd.DataFrame({"position": np.arange(len(num_tokens)), "num_tokens": num_tokens.astype(int)})
    for name, total in {"entropy": sums["entropy"], "surprisal": -sums["logps"]}.items():
        table[name] = total.sum(0) / num_tokens
        ends = ratio_intervals(torch.tensor(total), torch.tensor(sums["tokens"]))
        table[f"{name}_low"], table[f"{name}_high"] = ends.T.numpy()
    return table


def metrics_of(
    records: pd.DataFrame, prompts: pd.DataFrame, functions: Mapping[str, str] = MappingProxyType({})
) -> Metrics:
    """
    All metrics of `runs.metrics.EVALUATION`, and the means of functions: value, and the ends of the 95 % interval over
    prompts, None for metrics without an interval.
    """
    sampled = records[~records["greedy"]]
    spreads: Metrics = {
        f"{metric}_std": {"value": _known(sampled[column].std(ddof=0)), "low": None, "high": None}
        for metric, column in functions.items()
    }
    return _means(prompts) | _spreads(sampled) | _means_of_functions(prompts, functions) | spreads


def _means_of_functions(prompts: pd.DataFrame, functions: Mapping[str, str]) -> Metrics:
    known = {name: (prompts[f"{name}/sum"], prompts[f"{name}/num"]) for name in functions}
    known = {name: columns for name, columns in known.items() if columns[1].sum()}
    nothing: Metrics = {name: {"value": None, "low": None, "high": None} for name in functions}
    return nothing | (_with_intervals(known, ratio_intervals) if known else {})


def _means(prompts: pd.DataFrame) -> Metrics:
    """The metrics that are ratios of sums over prompts, with intervals."""
    one, samples, tokens = np.ones(len(prompts)), prompts["num_samples"], prompts["num_tokens"]
    shares: dict[str, tuple[Column, Column]] = {
        name: (prompts[name], one) for name in prompts if name.startswith("pass@")
    }
    shares |= {
        "greedy_accuracy": (prompts["greedy_correct"], one),
        "answer_tags": (prompts["num_answer_tags"], samples),
        "answer_tags_any": (prompts["num_answer_tags"] > 0, one),
        "well_formed": (prompts["num_well_formed"], samples),
        "undecided": (prompts["num_undecided"], samples),
        "clipped": (prompts["num_clipped"], samples),
    }
    ratios: dict[str, tuple[Column, Column]] = {
        "length_mean": (tokens, samples),
        "entropy_mean": (prompts["entropy_sum"], tokens),
        "surprisal_mean": (prompts["surprisal_sum"], tokens),
        "distinct_answers": (prompts["distinct_answers"], one),
    }
    return _with_intervals(shares, share_intervals) | _with_intervals(ratios, ratio_intervals)


def _with_intervals(columns: Mapping[str, tuple[Column, Column]], intervals: Callable[..., torch.Tensor]) -> Metrics:
    """Ratios of sums of two columns each, with their 95 % intervals over prompts."""
    tops, bottoms = (np.column_stack(column).astype(float) for column in zip(*columns.values(), strict=True))
    values, ends = tops.sum(0) / bottoms.sum(0), intervals(torch.tensor(tops), torch.tensor(bottoms)).tolist()
    return {
        name: {"value": float(value), "low": _known(low), "high": _known(high)}
        for name, value, (low, high) in zip(columns, values, ends, strict=True)
    }


def _known(end: float) -> float | None:
    return None if np.isnan(end) else end


def _spreads(sampled: pd.DataFrame) -> Metrics:
    """Extremes, standard deviations and percentiles over samples or tokens, without intervals."""
    lengths, right = sampled["length"], sampled.loc[sampled["correct"], "length"]
    values: dict[str, float | None] = {
        "length_std": lengths.std(ddof=0),
        "length_min": lengths.min(),
        "length_max": lengths.max(),
        "max_correct_length": right.max() if len(right) else None,
    }
    entropies, surprisals = np.concatenate([*sampled["entropies"]]), -np.concatenate([*sampled["logps"]])
    for name, tokens in {"entropy": entropies, "surprisal": surprisals}.items():
        values |= {f"{name}_std": tokens.std(), f"{name}_max": tokens.max(), f"{name}_p95": np.quantile(tokens, 0.95)}
    return {
        name: {"value": None if value is None else float(value), "low": None, "high": None}
        for name, value in values.items()
    }
