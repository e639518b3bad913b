"""The settings that differ from their defaults: those that someone chose, and no others."""

import json

from trl_entropy.analysis.run import load_run
from trl_entropy.config.changed_settings import changed_settings
from trl_entropy.config.dr_grpo import DrGRPOConfig
from trl_entropy.reporting.page_data import _changed
from trl_entropy.runs.directory import RunDirectory


def test_only_what_was_chosen_is_named(tmp_path):
    chosen = {"learning_rate": 3e-4, "use_cpu": True, "bf16": False, "kl_every": 5, "eval_strategy": "no"}
    args = DrGRPOConfig(output_dir=str(tmp_path), run_name="a name", **chosen)
    assert changed_settings(args) == {
        "learning_rate": [1e-6, 3e-4], "use_cpu": [False, True], "bf16": [None, False], "kl_every": [0, 5],
    }  # fmt: skip


def test_the_page_gets_them_from_the_run_directory(tmp_path):
    run = RunDirectory(tmp_path)
    run.write_environment(changed_settings={"learning_rate": [1e-6, 3e-4]})
    assert _changed(load_run(tmp_path)) == [["learning_rate", "1e-06", "0.0003"]]
    (tmp_path / "environment.json").write_text(json.dumps({"num_processes": 1}))
    assert _changed(load_run(tmp_path)) == []
