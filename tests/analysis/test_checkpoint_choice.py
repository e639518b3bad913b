"""The best checkpoint by a metric: the oracle's numbers, ties, expressions, and what is refused."""

import json

import numpy as np
import pandas as pd
import pytest

from trl_entropy.analysis.checkpoint_choice import best_checkpoint
from trl_entropy.best import main
from trl_entropy.runs.evaluated import best_step, terms_of

NUM = 40


def write(run, tables, **settings):
    for step, table in tables.items():
        folder = run / "evaluation" / f"step_{step:06d}"
        folder.mkdir(parents=True)
        table.to_parquet(folder / "prompts.parquet")
        summary = {"step": step, "settings": {"seed": 0} | settings.get(f"of_{step}", {}), "metrics": {}}
        (folder / "summary.json").write_text(json.dumps(summary))


def table(rates, tokens=10, entropy=2.0, ids=range(NUM)):
    return pd.DataFrame(
        {"prompt_id": [f"p{i}" for i in ids], "pass@1": rates, "num_samples": 4, "num_tokens": tokens,
         "entropy_sum": entropy, "greedy_correct": np.asarray(rates) > 0.5}
    )  # fmt: skip


@pytest.fixture
def rates():
    return np.random.default_rng(0).random(NUM)


def test_the_best_its_probability_and_the_intervals_are_those_of_the_slow_way(tmp_path, rates):
    rng = np.random.default_rng(1)
    others = [np.clip(rates + rng.normal(shift, 0.1, NUM), 0, 1) for shift in (0.02, -0.3)]
    write(tmp_path, {0: table(others[1]), 10: table(rates), 20: table(others[0])})
    choice = best_checkpoint(tmp_path, "pass@1")
    by_step = choice.table.set_index("step")
    assert choice.step == 20 == choice.table["step"][0] and choice.num_problems == NUM
    difference = rates - others[0]
    stderr = difference.std(ddof=1) / np.sqrt(NUM)
    assert by_step["difference"][10] == pytest.approx(difference.mean())
    assert by_step["high"][10] - by_step["low"][10] == pytest.approx(2 * 2.0227 * stderr, rel=1e-4)
    assert by_step["tied"].to_dict() == {20: True, 10: True, 0: False}
    draws = np.random.default_rng(7).integers(NUM, size=(4000, NUM))
    wins = np.mean(others[0][draws].mean(1) > rates[draws].mean(1))
    assert by_step["probability"][20] == pytest.approx(wins, abs=0.03)
    assert by_step["probability"].sum() == pytest.approx(1) and by_step["probability"][0] < 0.01


def test_equal_checkpoints_share_the_probability(tmp_path, rates):
    write(tmp_path, {10: table(rates), 20: table(rates)})
    assert best_checkpoint(tmp_path, "pass@1").table["probability"].tolist() == [0.5, 0.5]


def test_a_ratio_and_a_sum_of_metrics(tmp_path, rates):
    tokens = np.arange(1, NUM + 1)
    write(tmp_path, {10: table(rates, tokens, entropy=tokens * 0.3), 20: table(rates, tokens, entropy=tokens * 0.2)})
    value = best_checkpoint(tmp_path, "pass@1 - 0.5*entropy_mean").table
    assert value["step"].tolist() == [20, 10]
    assert value["value"].tolist() == pytest.approx([rates.mean() - 0.1, rates.mean() - 0.15])
    assert best_checkpoint(tmp_path, "entropy_mean").step == 10
    assert terms_of(" -2*a+ b_c - .5 * pass@4") == {"a": -2.0, "b_c": 1.0, "pass@4": -0.5}


@pytest.mark.parametrize("by", ["", "pass@1 entropy_mean", "pass@1 * 2", "3"])
def test_an_expression_that_is_none_is_refused(by):
    with pytest.raises(ValueError, match="write a metric"):
        terms_of(by)


def test_what_cannot_be_compared_is_refused(tmp_path, rates, capsys):
    def refused(name, *tables, **settings):
        write(tmp_path / name, dict(zip((10, 20), tables, strict=False)), **settings)
        with pytest.raises(SystemExit) as ended:
            main([str(tmp_path / name)])
        return str(ended.value)

    assert "has 1 evaluated checkpoints, and two are needed" in refused("one", table(rates))
    assert "evaluated with other settings (seed)" in refused("seeds", table(rates), table(rates), of_20={"seed": 1})
    assert "on other problems" in refused("ids", table(rates), table(rates, ids=range(1, NUM + 1)))
    write(tmp_path / "known", {10: table(rates), 20: table(rates)})
    with pytest.raises(ValueError, match=r"there is no metric 'reward'; the evaluations have pass@1, greedy"):
        best_checkpoint(tmp_path / "known", "reward")


def test_the_command_says_it_in_words(tmp_path, rates, capsys):
    write(tmp_path, {0: table(rates / 4), 10: table(rates)})
    main([str(tmp_path), "--by", "pass@1"])
    first, _, *rows = capsys.readouterr().out.splitlines()
    assert first.startswith(f"step 10 is the best of 2 by pass@1 on 40 problems: {rates.mean():.4f}; the probability")
    assert first.endswith("every other one is worse beyond its 95 % interval") and len(rows) == 2


def test_the_best_step_so_far_is_of_what_has_the_metric_and_not_the_start_policy(tmp_path):
    for step, value in ((0, 0.9), (10, 0.5), (20, 0.5), (30, 0.2), (40, None)):
        folder = tmp_path / "evaluation" / f"step_{step:06d}"
        folder.mkdir(parents=True)
        metrics = {"pass@1": {"value": value}, "entropy_mean": {"value": step / 10}}
        (folder / "summary.json").write_text(json.dumps({"step": step, "metrics": metrics}))
    assert best_step(tmp_path, "pass@1") == 20 and best_step(tmp_path, "pass@1 - entropy_mean") == 10
    assert best_step(tmp_path, "reward") is None is best_step(tmp_path / "nowhere", "pass@1")
