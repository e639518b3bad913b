"""Numbers of a checkpoint against loops over its records."""

import itertools
import math

import numpy as np
import pandas as pd
import pytest

from trl_entropy.evaluation.summary import metrics_of, position_table, prompt_table
from trl_entropy.runs.metrics import EVALUATION

RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def records():
    """Three prompts of different difficulty, four samples and a greedy completion each."""
    rows = []
    for prompt, chance in (("a", 0.2), ("b", 0.9), ("c", 0.0)):
        for sample in range(5):
            length, correct = int(RNG.integers(1, 7)), bool(RNG.random() < chance)
            extracted = None if RNG.random() < 0.3 and not correct else str(RNG.integers(3))
            rows.append({
                "prompt_id": prompt, "greedy": sample == 4, "sample": sample, "length": length, "correct": correct,
                "entropies": RNG.random(length), "logps": -RNG.random(length), "clipped": bool(RNG.random() < 0.3),
                "answer_tags": extracted is not None, "well_formed": correct, "extracted": extracted,
                "verdict": str(RNG.choice(["equal", "different", "rejected", "timeout", "failed"])),
            })  # fmt: skip
    return pd.DataFrame(rows)


def test_every_metric_of_the_table_and_no_other(records):
    metrics = metrics_of(records, prompt_table(records))
    assert {name for name in metrics if not name.startswith("pass@")} == set(EVALUATION) - {"pass@1"}
    assert [name for name in metrics if name.startswith("pass@")] == ["pass@1", "pass@2", "pass@4"]


def test_numbers_against_loops(records):
    metrics = {name: entry["value"] for name, entry in metrics_of(records, prompt_table(records)).items()}
    sampled = [row for row in records.to_dict("records") if not row["greedy"]]
    tokens = np.concatenate([row["entropies"] for row in sampled])
    surprisals = np.concatenate([-row["logps"] for row in sampled])
    right = [row["length"] for row in sampled if row["correct"]]
    answers = [(row["prompt_id"], row["extracted"]) for row in sampled if isinstance(row["extracted"], str)]
    expected = {
        "pass@1": np.mean([row["correct"] for row in sampled]),
        "pass@4": np.mean([any(row["correct"] for row in sampled if row["prompt_id"] == p) for p in "abc"]),
        "greedy_accuracy": records.loc[records["greedy"], "correct"].mean(),
        "answer_tags": np.mean([row["answer_tags"] for row in sampled]),
        "clipped": np.mean([row["clipped"] for row in sampled]),
        "undecided": np.mean([row["verdict"] in ("timeout", "failed") for row in sampled]),
        "length_mean": np.mean([row["length"] for row in sampled]),
        "length_std": np.std([row["length"] for row in sampled]),
        "max_correct_length": max(right),
        "entropy_mean": tokens.mean(), "entropy_std": tokens.std(), "entropy_max": tokens.max(),
        "entropy_p95": np.quantile(tokens, 0.95), "surprisal_mean": surprisals.mean(),
        "surprisal_p95": np.quantile(surprisals, 0.95),
        "distinct_answers": len(set(answers)) / 3,
    }  # fmt: skip
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(value), name


def test_intervals_against_all_resamples_of_three_prompts(records):
    """The quantiles of the 27 equally likely resamples; a bootstrap of many draws finds the same to within a step."""
    metrics, table = metrics_of(records, prompt_table(records)), prompt_table(records)
    per_token = [(table[name].to_numpy(), table["num_tokens"].to_numpy()) for name in ("entropy_sum", "surprisal_sum")]
    per_sample = [(table[name].to_numpy(), np.full(3, 4)) for name in ("num_tokens", "num_answer_tags", "num_correct")]
    names = ("entropy_mean", "surprisal_mean", "length_mean", "answer_tags", "pass@1")
    for name, (sums, counts) in zip(names, [*per_token, *per_sample], strict=True):
        means = [sums[[*drawn]].sum() / counts[[*drawn]].sum() for drawn in itertools.product(range(3), repeat=3)]
        # 1 of 27 resamples is the lowest and 1 the highest: both have more than 2.5 % of the probability
        assert metrics[name]["low"] == pytest.approx(min(means)), name
        assert metrics[name]["high"] == pytest.approx(max(means)), name
        assert metrics[name]["low"] < metrics[name]["value"] < metrics[name]["high"], name


def test_intervals_hold_their_number_and_spreads_have_none(records):
    for name, entry in metrics_of(records, prompt_table(records)).items():
        if name.rsplit("_", 1)[-1] in ("std", "min", "max", "p95") or name == "max_correct_length":
            assert entry["low"] is None
        else:
            assert entry["low"] <= entry["value"] <= entry["high"], name


def test_by_position_against_loops(records):
    table = position_table(records)
    sampled = [row for row in records.to_dict("records") if not row["greedy"]]
    for position in range(max(row["length"] for row in sampled)):
        here = [row for row in sampled if row["length"] > position]
        row = table.iloc[position]
        assert row["num_tokens"] == len(here)
        assert row["entropy"] == pytest.approx(np.mean([r["entropies"][position] for r in here]))
        assert row["surprisal"] == pytest.approx(np.mean([-r["logps"][position] for r in here]))
        assert row["entropy_low"] <= row["entropy"] <= row["entropy_high"]


def test_no_right_sample_and_one_prompt(records):
    one = records[records["prompt_id"] == "c"]
    metrics = metrics_of(one, prompt_table(one))
    assert metrics["max_correct_length"]["value"] is None and metrics["pass@1"] == {"value": 0.0, "low": None,
                                                                                    "high": None}  # fmt: skip
    assert math.isfinite(metrics["entropy_mean"]["value"])


def test_unequal_numbers_of_samples_are_refused(records):
    with pytest.raises(ValueError, match="different numbers of samples"):
        prompt_table(records.iloc[1:])
