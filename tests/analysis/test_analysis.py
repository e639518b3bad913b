"""DataFrames of a run equal its files: finished, live, killed inside a write, without probes."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from safetensors.numpy import load_file

from trl_entropy.analysis.comparison import compare_runs, over_runs, student_t
from trl_entropy.analysis.run import cosines_of, load_run, spectrum_of
from trl_entropy.analysis.tokens import high_entropy_tokens, token_dump, token_table
from trl_entropy.runs.directory import RunDirectory


def test_steps_are_the_lines_of_the_file(real_run):
    steps = load_run(real_run).steps
    for line in (real_run / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        assert steps.loc[row["step"], "reward"] == row["reward"]
        assert steps.loc[row["step"], "entropy/delta_linear"] == row["entropy/delta_linear"]
    assert steps.index.tolist() == [1, 2, 3] and steps["my/length_std"].notna().all()


def test_training_evaluation_and_completions(real_run):
    run = load_run(real_run)
    assert run.training_evaluation.index.tolist() == [0, 3]
    trained = run.completions[run.completions["step"] == 2]
    assert len(trained) == 16 and trained["tag_pref"].mean() == run.steps.loc[2, "reward"]


def test_tokens_of_a_probe_give_its_logged_entropy(real_run):
    run = load_run(real_run)
    tokens = run.tokens_of("entropy", 2)
    arrays = load_file(real_run / "probes" / "entropy" / "step_000002.safetensors")
    assert len(tokens) == arrays["completion_mask"].sum()
    row = arrays["completion_mask"][3].astype(bool)
    mine = tokens[tokens["row"] == 3]
    assert np.array_equal(mine["entropy_after"], arrays["entropy_after"][3][row])
    assert np.array_equal(mine["token_id"], arrays["input_ids"][3, -len(row) :][row])
    assert mine["position"].tolist() == list(range(row.sum())) and mine["token"].iloc[-1] == "<|endoftext|>"
    entropy = tokens["entropy_before"].astype(float).sum() / len(tokens)
    assert entropy == pytest.approx(run.steps.loc[2, "entropy/probe_batch"], rel=1e-5)
    assert len(run.tokens) == sum(len(run.tokens_of("entropy", step)) for step in (1, 2, 3))


def test_groups_have_the_logged_reward(real_run):
    run = load_run(real_run)
    groups = run.groups[run.groups["step"] == 3]
    assert groups["num_completions"].tolist() == [4, 4, 4, 4]
    assert groups["reward_mean"].mean() == pytest.approx(run.steps.loc[3, "reward"])


def test_evaluation_tokens_give_the_logged_entropy(real_run):
    run = load_run(real_run)
    numbers = run.evaluation.set_index(["step", "metric"])["value"]
    for step in (0, 3):
        tokens = run.evaluation_tokens[run.evaluation_tokens["step"] == step]
        assert tokens["entropy"].mean() == pytest.approx(numbers[step, "entropy_mean"])
        assert tokens["surprisal"].quantile(0.95) == pytest.approx(numbers[step, "surprisal_p95"])
        prompts, positions = (table[table["step"] == step] for table in (run.prompts, run.positions))
        assert prompts["pass@1"].mean() == pytest.approx(numbers[step, "pass@1"])
        assert positions["num_tokens"].sum() == len(tokens)


def test_a_run_without_anything_but_steps(tmp_path):
    RunDirectory(tmp_path).append_metrics(1, {"reward": 0.5})
    run = load_run(tmp_path)
    assert run.steps["reward"].tolist() == [0.5] and run.config == {} and run.environment == {}
    for table in (run.training_evaluation, run.completions, run.tokens, run.groups, run.evaluation, run.records,
                  run.prompts, run.positions, run.evaluation_tokens):  # fmt: skip
        assert table.empty


def test_a_killed_run_shows_what_was_whole(real_run, tmp_path, caplog):
    killed = tmp_path / "killed"
    shutil.copytree(real_run, killed)
    lines = (killed / "metrics.jsonl").read_text().splitlines(keepends=True)
    (killed / "metrics.jsonl").write_text(lines[0] + lines[1][:40])
    newest = max(killed.glob("completions/completions_*.parquet"))
    newest.write_bytes(newest.read_bytes()[:50])
    shutil.rmtree(killed / "evaluation" / "step_000003")
    (killed / "evaluation" / ".step_000003.tmp").mkdir()
    run, whole = load_run(killed), load_run(real_run)
    assert run.steps.index.tolist() == [1]
    pd.testing.assert_series_equal(run.steps["reward"], whole.steps["reward"].loc[[1]])
    assert len(run.completions) < len(whole.completions) and f"{newest} cannot be read" in caplog.text
    assert set(run.evaluation["step"]) == {0}


def test_one_table_of_many_is_read_alone(real_run, tmp_path):
    """What the page reads is a part of what the tables hold that read everything."""
    run = load_run(real_run)
    tokens, steps = run.evaluation_tokens, run.evaluated_steps
    assert steps == [0, 3]
    for step in steps:
        own = tokens[tokens["step"] == step].reset_index(drop=True)
        pd.testing.assert_frame_equal(run.evaluation_tokens_of(step), own)
        chosen = own[(own["prompt_id"] == tokens["prompt_id"].iloc[0]) & (own["sample"] == 0)]
        pd.testing.assert_frame_equal(run.first_samples()[step], chosen.reset_index(drop=True))
    records = run.records[~run.records["greedy"]]
    assert len(tokens) == records["length"].sum() and tokens["position"].max() == records["length"].max() - 1
    assert tokens["surprisal"].sum() == pytest.approx(-sum(values.sum(dtype=float) for values in records["logps"]))
    last = run.completions[run.completions["step"] == run.completions_steps[-1]].reset_index(drop=True)
    pd.testing.assert_frame_equal(run.last_completions(), last)
    assert run.probe_file("rollouts", 3, ["rewards"]).keys() == {"rewards"}
    damaged = tmp_path / "damaged"
    shutil.copytree(real_run / "completions", damaged / "completions")
    max(damaged.glob("completions/completions_*")).write_bytes(b"PAR1")
    assert load_run(damaged).last_completions()["step"].unique().tolist() == [run.completions_steps[-2]]
    assert load_run(tmp_path).last_completions().empty and load_run(tmp_path).first_samples() == {}


def test_a_run_without_a_kernel_says_so(tmp_path):
    with pytest.raises(ValueError, match=r"holds no Fisher kernel\. Train with fisher_probe: true"):
        load_run(tmp_path).kernel()


def test_a_path_that_is_no_run(tmp_path):
    with pytest.raises(ValueError, match="There is no directory"):
        load_run(tmp_path / "none")


def test_nothing_is_read_before_it_is_asked_for(tmp_path):
    (tmp_path / "metrics.jsonl").mkdir()  # reading it would raise
    assert "Run(" in repr(load_run(tmp_path))


def test_reading_a_run_imports_no_torch(real_run):
    code = (
        "import sys; from trl_entropy.analysis.run import load_run; from trl_entropy.reporting.page import render; "
        f"from pathlib import Path; run = load_run({str(real_run)!r}); run.tokens, run.evaluation_tokens, run.groups; "
        "render([run]); sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'trl')))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_over_runs_is_the_student_interval(tmp_path):
    for run, values in {"a": (1.0, 2.0), "b": (2.0, 4.0), "c": (6.0,)}.items():
        for step, value in enumerate(values, start=1):
            RunDirectory(tmp_path / run).append_metrics(step, {"x": value})
    steps = compare_runs([tmp_path / run for run in "abc"])
    assert list(steps)[:2] == ["run", "step"] and len(steps) == 5
    table = over_runs(steps, "x")
    margin = 4.302653 * np.std([1, 2, 6], ddof=1) / 3**0.5
    assert table.loc[1].tolist() == pytest.approx([3.0, 3 - margin, 3 + margin, 3], rel=1e-4)
    assert table.loc[2, "num_runs"] == 2
    assert over_runs(steps[steps["run"] == "c"], "x").loc[1, ["low", "high"]].isna().all()


def test_intervals_of_a_step_are_students_with_the_prompts_that_it_names(tmp_path):
    row = {"entropy/delta_measured": -0.01, "entropy/delta_measured_stderr": 0.002, "entropy/num_prompts": 4}
    half = {"reward/half_a_linear": 0.5, "reward/half_a_linear_stderr": 0.1, "reward/half_a_num_prompts": 2}
    control = {"fisher/diagonal": 1.0, "fisher/diagonal_stderr": 0.1}
    RunDirectory(tmp_path).append_metrics(1, row | half | control)
    RunDirectory(tmp_path).append_metrics(2, {"reward": 1.0})
    RunDirectory(tmp_path).append_metrics(3, row | {"entropy/num_prompts": 1})
    run = load_run(tmp_path)
    table = run.intervals()
    margin = 3.182446 * 0.002
    assert table.index.tolist() == [1, 3] and table.loc[1, "num_prompts"] == 4
    assert table.loc[1, ["low", "high"]].tolist() == pytest.approx([-0.01 - margin, -0.01 + margin], rel=1e-6)
    assert table.loc[3, ["low", "high"]].isna().all()
    assert run.intervals("reward/half_a_linear").loc[1, "high"] == pytest.approx(0.5 + 12.7062 * 0.1, rel=1e-5)
    for key, told in (("reward", "no standard error"), ("fisher/diagonal", "num_prompts="), ("x", "No step has")):
        with pytest.raises(ValueError, match=told):
            run.intervals(key)


def test_student_t_is_that_of_a_printed_table():
    for dof, quantile in ((1, 12.706), (2, 4.303), (5, 2.571), (10, 2.228), (20, 2.086), (100, 1.984)):
        assert student_t(dof) == pytest.approx(quantile, abs=5e-4)
    assert 2.571 < student_t(4.5) < 2.776 and np.isnan(student_t(0))


def test_token_table_leaves_padding_out():
    arrays = {
        "input_ids": np.array([[9, 9, 1, 2, 0], [9, 9, 3, 0, 0]]), "completion_mask": np.array([[1, 1, 0], [1, 0, 0]]),
        "attention_mask": np.ones((2, 5)), "prompt_index": np.array([7, 8]),
        "entropy": np.array([[0.1, 0.2, 9.0], [0.3, 9.0, 9.0]]),
    }  # fmt: skip
    table = token_table(arrays)
    assert table.to_dict("list") == {
        "row": [0, 0, 1], "prompt_index": [7, 7, 8], "position": [0, 1, 0], "token_id": [1, 2, 3],
        "entropy": [0.1, 0.2, 0.3],
    }  # fmt: skip


def test_high_entropy_tokens_against_counting():
    tokens = pd.DataFrame({"token": list("aabbbc"), "entropy": [1.0, 3.0, 0.5, 0.5, 2.0, 3.0]})
    table = high_entropy_tokens(tokens, quantile=0.5, min_count=2)
    assert table.index.tolist() == ["a", "b"]  # c was drawn once
    assert table.loc["a"].tolist() == [2, 2.0, 0.5, 0.4]  # above the median, 1.5: one of two
    assert table.loc["b", "high_fraction"] == pytest.approx(1 / 3)


def test_a_token_dump_reads_as_text_and_steers_no_terminal():
    tokens = pd.DataFrame({"position": [0, 1], "token": [" a", "\x1b[31m"], "entropy": [0.5, 1.0],
                           "surprisal": [0.1, 0.2]})  # fmt: skip
    lines = token_dump(tokens, width=10).splitlines()
    assert lines[1].count("█") == 5 and lines[2].count("█") == 10
    assert "\x1b" not in lines[2] and "1.0000" in lines[2]


def test_no_file_of_the_package_names_this_machine():
    for path in Path(__file__).parents[2].glob("notebooks/*.ipynb"):
        assert str(Path.home()) not in path.read_text()


def test_shares_of_the_kernel_by_layer_and_matrix(real_run):
    run = load_run(real_run)
    (*_, step) = run.probe_steps("fisher")
    shares, arrays = run.kernel_shares(step), run.probe_file("fisher", step)
    assert shares["share"].sum() == pytest.approx(1) and (shares["share"] >= 0).all()
    assert sorted(shares["layer"].dropna().unique()) == [0, 1]
    by_name = shares.set_index("parameter")
    assert by_name.loc["model.layers.1.self_attn.q_proj.weight", "matrix"] == "self_attn.q_proj.weight"
    assert by_name.loc["model.norm.weight", "matrix"] == "model.norm.weight"
    # What the parameters add to K_ii is K_ii
    assert arrays["parameter_norms"].sum(0) == pytest.approx(np.diag(arrays["kernel"]), rel=1e-5)


def test_kernels_by_prompt_and_their_cosines(real_run):
    run = load_run(real_run)
    (*_, step) = run.probe_steps("fisher")
    kernel, arrays = run.kernel(step), run.probe_file("fisher", step)
    pd.testing.assert_frame_equal(run.kernel(), kernel)
    assert kernel.index.get_level_values("prompt_index").is_monotonic_increasing
    for i, j in ((0, 1), (2, 7)):
        names = [(arrays["prompt_index"][row], arrays["rows"][row]) for row in (i, j)]
        assert kernel.loc[names[0], names[1]] == arrays["kernel"][i, j]
    assert np.allclose(np.diag(cosines_of(kernel)), 1)
    assert spectrum_of(kernel).iloc[0] == pytest.approx(run.steps.loc[step, "fisher/eigenvalue_1"], rel=1e-4)
