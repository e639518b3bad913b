"""The run directory: what is written is read back, and what a kill leaves is readable."""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from trl_entropy.runs.directory import RunDirectory
from trl_entropy.runs.set_aside import set_aside_after


def test_metrics_round_trip_in_order_of_step(tmp_path):
    run = RunDirectory(tmp_path / "new" / "run")
    run.append_metrics(1, {"reward": 0.25, "kl": float("nan")})
    run.append_metrics(2, {"reward": np.float32(0.5), "num_tokens": np.int64(7), "missing": None})
    rows = run.metrics()
    assert [row["step"] for row in rows] == [1, 2]
    assert rows[0]["reward"] == 0.25 and math.isnan(rows[0]["kl"])
    assert rows[1] == {"step": 2, "reward": 0.5, "num_tokens": 7, "missing": None}


def strict_rows(path):
    """The lines as a reader sees them whose JSON has no nan and no infinity."""

    def refuse(name):
        raise ValueError(f"{name} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def test_any_reader_opens_the_file_and_ours_restores_what_is_not_finite(tmp_path):
    run, given = RunDirectory(tmp_path), {"loss": math.nan, "upper": math.inf, "lower": -np.float32("inf"), "kl": 0.5}
    run.append_metrics(1, given)
    run.append_metrics(2, {"kl": 0.25, "given": None})
    expected = {"step": 1, "loss": None, "upper": None, "lower": None, "kl": 0.5}
    names = {"not_finite": {"loss": "nan", "upper": "inf", "lower": "-inf"}}
    assert strict_rows(run.metrics_path) == [expected | names, {"step": 2, "kl": 0.25, "given": None}]
    set_aside_after(run, 1)
    assert strict_rows(run.metrics_path) == [expected | names]
    (row,) = run.metrics()
    assert math.isnan(row.pop("loss"))
    assert row == {"step": 1, "upper": math.inf, "lower": -math.inf, "kl": 0.5}


def test_lines_of_older_runs_are_read(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "upper": Infinity, "loss": NaN}\n')
    (row,) = RunDirectory(tmp_path).metrics()
    assert row["upper"] == math.inf and math.isnan(row["loss"])


def test_a_repeated_step_counts_once_and_the_last_wins(tmp_path):
    run = RunDirectory(tmp_path)
    for step, reward in ((1, 0.1), (2, 0.2), (2, 0.3)):
        run.append_metrics(step, {"reward": reward})
    assert [(row["step"], row["reward"]) for row in run.metrics()] == [(1, 0.1), (2, 0.3)]


def test_half_a_line_is_passed_over_and_the_next_line_stands_alone(tmp_path):
    """Cut after every byte of the second line; without its end alone, it is whole."""
    run = RunDirectory(tmp_path)
    run.append_metrics(1, {"reward": 0.1})
    first = run.metrics_path.stat().st_size
    run.append_metrics(2, {"reward": 0.2})
    both = run.metrics_path.read_bytes()
    for cut in range(first + 1, len(both)):
        run.metrics_path.write_bytes(both[:cut])
        whole = [1, 2] if cut == len(both) - 1 else [1]
        assert [row["step"] for row in run.metrics()] == whole
        assert run.unreadable_lines[run.metrics_path] == ([] if len(whole) == 2 else [2])
        run.append_metrics(3, {"reward": 0.3})
        assert run.metrics()[0] == {"step": 1, "reward": 0.1}
        assert [row["step"] for row in run.metrics()] == [*whole, 3]


def test_evaluation_rows_keep_their_columns(tmp_path):
    run = RunDirectory(tmp_path)
    run.append_evaluation(20, {"reward": 0.5})
    run.append_evaluation(0, {"reward": 0.25, "entropy": 0.3})
    run.append_evaluation(20, {"reward": 0.75})
    assert run.evaluation() == [{"step": 0, "reward": 0.25, "entropy": 0.3}, {"step": 20, "reward": 0.75}]


def test_evaluation_sets_of_one_step_stand_beside_one_another(tmp_path):
    run = RunDirectory(tmp_path)
    for dataset, reward in (("easy", 0.5), ("hard", 0.25), ("easy", 0.75)):
        run.append_evaluation(20, {"reward": reward}, dataset)
    found = {row["dataset"]: row["reward"] for row in run.evaluation()}
    assert found == {"easy": 0.75, "hard": 0.25} and len(run.evaluation()) == 2


def test_what_is_added_later_is_joined_to_its_step_and_makes_none(tmp_path):
    run = RunDirectory(tmp_path)
    run.append_metrics(1, {"reward": 0.5})
    run.append_metrics(2, {"reward": 0.25})
    run.append_later(1, {"entropy/delta": -0.125})
    run.append_later(3, {"entropy/delta": 7.0})  # of a step whose own line is not there
    assert run.metrics() == [{"step": 1, "reward": 0.5, "entropy/delta": -0.125}, {"step": 2, "reward": 0.25}]


def test_a_directory_that_holds_a_step_is_in_use(tmp_path):
    run = RunDirectory(tmp_path)
    run.check_unused()
    run.append_metrics(1, {"reward": 0.5})
    with pytest.raises(ValueError, match=r"already holds a run of 1 step\."):
        run.check_unused()


def test_secrets_are_masked_in_every_file(tmp_path, monkeypatch):
    secret = "hf_" + "a" * 30
    monkeypatch.setattr("sys.argv", ["train.py", "--hub_token", secret])
    run = RunDirectory(tmp_path)
    run.write_config({"hub_token": secret, "model_init_kwargs": {"token": secret}, "note": f"use {secret}"})
    run.write_environment(note=secret)
    run.append_start(0, None, {"hub_token": (secret, secret + "b")})
    assert len(list(tmp_path.iterdir())) == 3
    assert [path.name for path in tmp_path.iterdir() if secret in path.read_text()] == []


def test_config_and_environment(tmp_path):
    run = RunDirectory(tmp_path)
    run.write_config({"learning_rate": 1e-6, "name": "x", "nested": {"a": [1, None]}})
    run.write_environment(num_processes=2)
    import yaml

    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["nested"] == {"a": [1, None]}
    environment = json.loads((tmp_path / "environment.json").read_text())
    assert environment["num_processes"] == 2
    assert environment["packages"]["torch"] and environment["python"]
    checkout = Path(__file__).parents[2]
    git = subprocess.run(["git", "-C", checkout, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    assert (environment["git_commit"] or "").removesuffix("+") == git.stdout.strip()


def test_reading_a_run_imports_no_torch():
    modules = "trl_entropy.runs.directory, trl_entropy.runs.metrics, trl_entropy.analysis.plots"
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
