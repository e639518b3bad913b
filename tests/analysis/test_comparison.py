"""Runs side by side: each once, by name, with the settings in which they differ; a mean over seeds alone."""

import pandas as pd
import pytest

from trl_entropy.analysis.comparison import compare_runs, differing_settings, distinct, over_runs
from trl_entropy.runs.directory import RunDirectory


def a_run(path, rewards=(0.5,), **config):
    run = RunDirectory(path)
    for step, reward in enumerate(rewards, start=1):
        run.append_metrics(step, {"reward": reward})
    if config:
        run.write_config(config)
    return path


def test_runs_of_several_seeds_have_no_differing_settings(tmp_path):
    for seed in (0, 1):
        a_run(
            tmp_path / f"seed-{seed}", seed=seed, data_seed=seed, output_dir=f"runs/{seed}", run_name=str(seed), beta=0
        )
    steps = compare_runs(tmp_path.iterdir())
    assert list(steps)[:3] == ["run", "step", "settings"] and set(steps["settings"]) == {""}
    assert over_runs(steps, "reward")["num_runs"].tolist() == [2]


def test_any_other_setting_is_named_and_parts_the_means(tmp_path):
    for name, seed, rate, value in (("a", 0, 1e-5, 0.1), ("b", 1, 1e-5, 0.3), ("c", 0, 3e-4, 0.9)):
        a_run(tmp_path / name, (value,), seed=seed, learning_rate=rate, beta=0.0)
    steps = compare_runs(tmp_path / name for name in "abc")
    assert steps["settings"].tolist() == ["learning_rate 1e-05", "learning_rate 1e-05", "learning_rate 0.0003"]
    means = over_runs(steps, "reward")
    assert means.loc[("learning_rate 1e-05", 1), "mean"] == pytest.approx(0.2)
    assert means.loc[("learning_rate 0.0003", 1), ["mean", "num_runs"]].tolist() == [0.9, 1]


def test_settings_in_words():
    configs = {
        "a": {"x": 1, "y": [1, 2], "model_config": {"size": 3, "heads": 2}, "p": 0, "q": 0},
        "b": {"x": 1, "y": [1, 3], "model_config": {"size": 4, "heads": 2}, "p": 1, "q": 1},
        "c": {},
    }
    assert differing_settings(configs) == {
        "a": "y [1, 2], model_config.size 3, p 0, 1 more",
        "b": "y [1, 3], model_config.size 4, p 1, 1 more",
        "c": "settings unknown",
    }
    assert differing_settings({"a": {}, "b": {}}) == {"a": "", "b": ""}


def test_values_that_read_alike_are_told_apart():
    long = "/a/long/path" * 10
    configs = {name: {"data": start + long} for name, start in (("a", "x"), ("b", "y"), ("c", "x"))}
    texts = differing_settings(configs)
    assert texts["a"] == texts["c"] != texts["b"] and texts["b"] == f"{texts['a']} (2)"


def test_values_of_which_one_begins_with_another_need_no_number():
    assert differing_settings({"a": {"lr": 0.15}, "b": {"lr": 0.1}}) == {"a": "lr 0.15", "b": "lr 0.1"}


def test_where_an_embedded_model_lies_is_no_setting_where_the_model_is_named():
    configs = {seed: {"seed": seed, "model_config": {"_name_or_path": f"cache/{seed}"}} for seed in ("0", "1")}
    assert differing_settings(configs)["0"] == "model_config._name_or_path cache/0"
    named = {seed: config | {"model_name_or_path": "embedded"} for seed, config in configs.items()}
    assert set(differing_settings(named).values()) == {""}


def test_one_run_given_twice_counts_once(tmp_path):
    run = a_run(tmp_path / "run")
    (tmp_path / "link").symlink_to(run)
    assert distinct([run, f"{run}/", tmp_path / "link"]) == [run]
    assert len(compare_runs([run, tmp_path / "link"])) == 1


def test_two_runs_of_one_name_are_refused(tmp_path):
    with pytest.raises(ValueError, match="not all different"):
        compare_runs([a_run(tmp_path / "x" / "run"), a_run(tmp_path / "y" / "run")])


def test_a_key_that_no_run_has_gives_no_means():
    assert over_runs(pd.DataFrame({"run": ["a"], "step": [1]}), "reward").empty
