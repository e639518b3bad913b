"""Numbers of a checkpoint against loops over its records."""

import math

import numpy as np
import pandas as pd
import pytest
import torch

from trl_entropy.estimators.statistics.over_prompts import ratio_intervals, share_intervals
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


def test_each_interval_is_that_of_its_own_sums_over_prompts(records):
    table = prompt_table(records)
    metrics, one = metrics_of(records, table), np.ones(3)
    per_token = {"entropy_mean": "entropy_sum", "surprisal_mean": "surprisal_sum"}
    columns = {name: (table[sums], table["num_tokens"], ratio_intervals) for name, sums in per_token.items()}
    columns["length_mean"] = (table["num_tokens"], table["num_samples"], ratio_intervals)
    columns["pass@1"] = (table["pass@1"], one, share_intervals)
    columns["answer_tags"] = (table["num_answer_tags"], table["num_samples"], share_intervals)
    found = []
    for name, (sums, counts, intervals) in columns.items():
        tensors = (torch.tensor(np.asarray(column, dtype=float))[:, None] for column in (sums, counts))
        (low, high), entry = intervals(*tensors)[0].tolist(), metrics[name]
        assert (entry["low"], entry["high"]) == pytest.approx((low, high)), name
        assert low < entry["value"] < high, name
        found.append((low, high))
    assert len(set(found)) == len(found)  # or the columns might be exchanged


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
