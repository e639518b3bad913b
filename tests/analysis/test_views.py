"""The tables behind the page's views: every number is one of the run's files or a sum of them done here anew."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from safetensors.numpy import load_file, save_file

from trl_entropy.analysis.run import load_run
from trl_entropy.analysis.summary import summary, total
from trl_entropy.analysis.view_columns import COLUMNS, column
from trl_entropy.analysis.views import last_view, parts, steps_with_completions, view
from trl_entropy.runs.directory import RunDirectory
from trl_entropy.runs.step_files import completions_path, completions_steps, write_dropped

STEP = 2


@pytest.fixture(scope="module")
def run(real_run):
    return load_run(real_run)


@pytest.fixture(scope="module")
def arrays(real_run):
    folder, file = real_run / "probes", f"step_{STEP:06d}.safetensors"
    return {probe: load_file(folder / probe / file) for probe in ("rollouts", "attribution", "entropy")}


@pytest.fixture
def copy(real_run, tmp_path) -> Path:
    left_out = shutil.ignore_patterns("model.safetensors", "report", "checkpoint-*")
    return Path(shutil.copytree(real_run, tmp_path / "copy", ignore=left_out))


@pytest.mark.parametrize("name", COLUMNS)
def test_every_column_has_a_meaning(run, name):
    table = view(run, name, STEP)
    assert (len(table) or name == "dropped") and {key for key in COLUMNS[name] if key not in table} <= {
        "text", "prompt", "context_length", "turns", "kind", "turn", "own", "round", "logp_change", "entropy_change",
    }  # fmt: skip
    assert all(column(name, key).help or name == "steps" for key in table)


def test_steps_are_the_lines_of_the_log(run, real_run):
    rows = [json.loads(line) for line in (real_run / "metrics.jsonl").read_text().splitlines()]
    logged = {}
    for row in rows:
        logged.setdefault(row["step"], {}).update(row)
    table = view(run, "steps").set_index("step")
    for step, row in logged.items():
        assert table["entropy/delta_measured"][step] == row["entropy/delta_measured"]
        assert table["reward"][step] == row["reward"]


def test_parts_sum_to_the_measured_and_the_first_order_change(run):
    table = parts(run)
    for step, own in table.groupby("step"):
        row = run.steps.loc[step]
        assert own["change"].sum() == pytest.approx(row["entropy/delta_measured"], abs=1e-15)
        first_order = own[own["part"] != "curvature"]["change"].sum()
        assert first_order == pytest.approx(row["entropy/delta_linear"], abs=1e-15)
        assert {"momentum", "gradient", "rounding", "curvature"} <= set(own["part"])


def test_completions_are_the_files_rows(run, arrays):
    table, mask = view(run, "completions", STEP), arrays["rollouts"]["completion_mask"]
    for row in range(len(mask)):
        given = arrays["attribution"]
        assert table["reward"][row] == arrays["rollouts"]["rewards"][row] == table["reward/tag_pref"][row]
        assert table["advantage"][row] == given["raw_advantages"][row]
        assert table["change"][row] == pytest.approx(given["attribution"][row].astype(float).sum(), rel=1e-12)
        assert table["entropy"][row] == pytest.approx(given["entropy"][row][mask[row]].astype(float).mean())
        assert table["length"][row] == mask[row].sum()


def test_groups_are_sums_over_their_completions(run):
    groups, completions = view(run, "groups", STEP), view(run, "completions", STEP)
    assert groups["change"].sum() == pytest.approx(completions["change"].sum(), rel=1e-12)
    for group in groups.to_dict("records"):
        own = completions[completions["prompt_index"] == group["prompt_index"]]
        assert group["num_completions"] == len(own) and group["reward_mean"] == own["reward"].mean()
        assert group["reward_std"] == pytest.approx(own["reward"].std(), nan_ok=True)
        assert group["change_stderr"] == pytest.approx(own["change"].std() * math.sqrt(len(own)))
        assert group["signal"] == ("yes" if (own["reward"] != own["reward"].iloc[0]).any() else "no")
        assert group["prompt"] == run.prompt_text(STEP, group["prompt_index"])
        assert group["entropy"] == pytest.approx((own["entropy"] * own["length"]).sum() / own["length"].sum())


def test_tokens_are_the_files_numbers(run, arrays):
    rows = [5, 2]
    table, mask = view(run, "tokens", STEP, rows), arrays["rollouts"]["completion_mask"]
    assert list(dict.fromkeys(table["row"])) == rows
    for row in rows:
        own, kept = table[table["row"] == row], mask[row]
        given = arrays["attribution"]
        for name, key in (("change", "attribution"), ("logp", "logps"), ("weight", "loss_coefficients")):
            assert np.array_equal(own[name], given[key][row][kept].astype(float))
        assert own["position"].tolist() == list(range(kept.sum()))
        assert "".join(own["token"]) == "".join(run.texts_of(own["token_id"]))
    assert "own" not in table


def test_measured_tokens_have_the_change_by_the_step(run, arrays):
    table, given = view(run, "measured_tokens", STEP, [1]), arrays["entropy"]
    kept = given["completion_mask"][1]
    change = given["entropy_after"][1].astype(float) - given["entropy_before"][1].astype(float)
    assert np.array_equal(table["entropy_change"], change[kept])
    whole = view(run, "measured_completions", STEP)
    logps = given["logps_after"][1].astype(float) - given["logps_before"][1].astype(float)
    assert whole["logp_change"][1] == pytest.approx(logps[kept].sum(), rel=1e-5)


def test_tokens_of_tools_are_context_and_have_no_numbers(copy):
    for probe in ("rollouts", "attribution"):
        file = copy / "probes" / probe / f"step_{STEP:06d}.safetensors"
        given = load_file(file)
        own = given["completion_mask"].copy()
        own[:, 2:4] = False
        kind = {"kind": np.zeros(own.shape, dtype=np.uint8)} if probe == "attribution" else {}
        save_file(given | {"loss_mask": own} | kind, file)
    run = load_run(copy)
    tokens, completions = view(run, "tokens", STEP, [0]), view(run, "completions", STEP)
    assert tokens["own"].tolist()[:5] == [True, True, False, False, True]
    assert tokens["change"].isna().tolist()[:5] == [False, False, True, True, False]
    assert tokens["turn"].tolist()[:2] == [1, 1] and tokens["turn"].tolist()[4] == 2
    assert tokens["kind"].tolist()[:2] == ["prose", "prose"] and pd.isna(tokens["kind"][2])
    assert completions["turns"][0] == 2 and completions["context_length"][0] == 2


def test_how_completions_end(copy):
    file = copy / "probes" / "rollouts" / f"step_{STEP:06d}.safetensors"
    given = load_file(file)
    mask, ids = given["completion_mask"].copy(), given["input_ids"].copy()
    width = mask.shape[1]
    mask[0], mask[1], mask[2] = True, False, False
    mask[2, :3] = True
    ids[0, -1], ids[2, -width + 2], ids[3, -width:] = 7, 7, 1
    save_file(given | {"completion_mask": mask, "input_ids": ids}, file)
    config = (copy / "config.yaml").read_text().replace("max_completion_length: 32", f"max_completion_length: {width}")
    (copy / "config.yaml").write_text(config)
    for other in ("attribution", "entropy"):
        (copy / "probes" / other / file.name).unlink()
    table = view(load_run(copy), "completions", STEP)
    assert table["end"].tolist()[:4] == ["truncated", "masked", "stopped", "ended"]
    assert "change" not in table


def test_a_step_without_probe_files_has_texts(copy):
    shutil.rmtree(copy / "probes" / "rollouts")
    run = load_run(copy)
    assert set(steps_with_completions(run)) <= set(run.completions_steps) and steps_with_completions(run)
    step = steps_with_completions(run)[0]
    table, logged = view(run, "completions", step), run.completions_of(step)
    assert table["text"].tolist() == logged["completion"].tolist()
    assert table["reward"].tolist() == logged["tag_pref"].tolist()
    assert view(run, "groups", step)["prompt"].tolist() == list(dict.fromkeys(logged["prompt"]))


def test_tables_of_an_evaluation_are_not_taken_for_a_steps_completions(copy):
    """TRL writes what it evaluates at a step over the table of that step; runs of earlier versions have it so."""
    shutil.rmtree(copy / "probes" / "rollouts")
    run = load_run(copy)
    assert steps_with_completions(run) == run.completions_steps == [1, 2, 3]
    evaluated = completions_steps(copy, "evaluation")
    for step in evaluated:
        completions_path(copy, step, "evaluation").replace(completions_path(copy, step))
    run = load_run(copy)
    assert evaluated and steps_with_completions(run) == [step for step in (1, 2, 3) if step not in evaluated]


def test_what_was_evaluated(run, real_run):
    table = view(run, "evaluation")
    own = table[table["source"] == "training"].set_index(["step", "metric"])["value"]
    assert own[0, "reward"] == RunDirectory(real_run).evaluation()[0]["reward"]
    checkpoints = table[table["source"] == "evaluate"].set_index(["step", "metric"])
    for summary_of in RunDirectory(real_run).checkpoint_summaries():
        entry = summary_of["metrics"]["pass@1"]
        found = checkpoints.loc[(summary_of["step"], "pass@1")]
        assert (found["value"], found["low"], found["high"]) == (entry["value"], entry["low"], entry["high"])


def test_groups_that_were_dropped(copy):
    logged = {
        "prompt": ["a?", "a?", "b?", "b?"], "completion": ["x", "y", "z", "z"], "mine": [0.0, 0.0, 0.0, 1.0],
        "resample_round": [0, 0, 1, 1], "group": [3, 3, 9, 9], "rule": ["equal rewards"] * 2 + ["not needed"] * 2,
    }  # fmt: skip
    write_dropped(copy, STEP, logged, None)
    table = view(load_run(copy), "dropped", STEP)
    assert table["reward"].tolist() == table["reward/mine"].tolist() == logged["mine"]
    assert table["rule"].tolist() == logged["rule"] and table["group"].tolist() == [3, 3, 9, 9]
    assert table["round"].tolist() == [0, 0, 1, 1] and table["text"].tolist() == logged["completion"]
    assert view(load_run(copy), "dropped", 3).empty
    file = completions_path(copy, STEP)
    pd.read_parquet(file).assign(resample_round=1).to_parquet(file)
    run = load_run(copy)
    assert view(run, "groups", STEP)["round"].eq(1).all() and view(run, "completions", STEP)["round"].eq(1).all()
    assert [name for name in view(run, "completions", STEP) if name.startswith("reward/")] == ["reward/tag_pref"]


def test_changes_that_were_measured_on_the_steps_own_completions(run, copy, arrays):
    fisher = load_file(copy / "probes" / "fisher" / f"step_{STEP:06d}.safetensors")
    of_all = view(run, "completions", STEP)["logp_change"]  # by the likelihood probe
    assert of_all.notna().all()
    shutil.rmtree(copy / "probes" / "likelihood")
    found = view(load_run(copy), "completions", STEP)["logp_change"]
    assert found[fisher["rows"]].tolist() == fisher["logps_change_measured"].astype(float).tolist()
    assert found.notna().sum() == len(fisher["rows"])
    assert found[fisher["rows"]].tolist() == pytest.approx(of_all[fisher["rows"]].tolist(), abs=1e-6)
    given = arrays["rollouts"]
    scores = {
        f"{name}_{end}": value * given["completion_mask"].astype(np.float32)
        for name in ("logps", "entropy") for end, value in (("before", -1.0), ("after", -0.75))
    }  # fmt: skip
    save_file(given | scores, copy / "probes" / "entropy" / f"step_{STEP:06d}.safetensors")
    text = (copy / "config.yaml").read_text()
    (copy / "config.yaml").write_text(text.replace("completions: held_out", "completions: rollouts"))
    run = load_run(copy)
    table = view(run, "completions", STEP)
    assert table["logp_change"].tolist() == (0.25 * table["length"]).tolist()
    assert view(run, "tokens", STEP)["logp_change"].eq(0.25).all()
    assert table["entropy_change"].eq(0.25).all() and view(run, "tokens", STEP)["entropy_change"].eq(0.25).all()


def test_the_newest_step_that_has_a_view(run, tmp_path):
    for name in ("groups", "completions", "tokens", "measured_completions", "measured_tokens"):
        pd.testing.assert_frame_equal(last_view(run, name), view(run, name, 3))
        assert last_view(load_run(tmp_path), name).empty
    assert last_view(run, "dropped").empty and "rule" in last_view(run, "dropped")


@pytest.mark.parametrize(
    "name, told",
    [
        ("parts", "entropy_attribution: sequence or token"),
        ("evaluation", "eval_strategy"),
        ("groups", "of step 7 has no rows"),
        ("completions", "no step of this run has it"),
        ("tokens", "probes/rollouts"),
        ("dropped", "resample_uninformative_groups"),
        ("measured_completions", "probes/entropy"),
        ("measured_tokens", "entropy_probe: true"),
    ],
)
def test_a_view_without_rows_says_what_it_needs(tmp_path, caplog, name, told):
    path = run_of(tmp_path / "run", [{"entropy/delta_linear": -0.01}])
    assert view(load_run(path), name, 7).empty
    assert told in caplog.records[-1].getMessage()


def test_a_view_with_rows_says_nothing_and_one_of_another_step_names_those_that_have_it(run, caplog):
    assert not view(run, "parts").empty and not view(run, "tokens", STEP).empty and not caplog.records
    assert view(run, "tokens", 99).empty
    assert "steps that have it: 1, 2, 3." in caplog.text


def test_unknown_views_are_refused(run):
    with pytest.raises(ValueError, match="use one of"):
        view(run, "layers", STEP)
    with pytest.raises(ValueError, match="with a step"):
        view(run, "groups")


def run_of(tmp_path, rows) -> Path:
    directory = RunDirectory(tmp_path / "run")
    for step, row in enumerate(rows, start=1):
        directory.append_metrics(step, row)
    return directory.path


def test_the_summary_adds_changes_and_errors(tmp_path):
    rows = [
        {"reward": 0.1 * step, "entropy/delta_measured": -0.01 * step, "entropy/delta_measured_stderr": 0.003,
         "entropy/delta_linear": -0.02 * step, "entropy/delta_linear_stderr": 0.004,
         "entropy/delta_momentum": -0.015 * step, "entropy/delta_gradient": -0.005 * step}
        for step in range(1, 11)
    ]  # fmt: skip
    run = load_run(run_of(tmp_path, [*rows, {"reward": 1.1}]))
    found = total(run, "entropy/delta_measured")
    assert found.value == pytest.approx(-0.55) and found.stderr == pytest.approx(0.003 * 10**0.5)
    text = " ".join(sentence.text for sentence in summary(run))
    assert "10 of 11 steps were measured; together they lowered the entropy by 0.55 ± 0.0095 nats per token." in text
    assert "First order said −1.1 ± 0.013, of which momentum made 75 %." in text
    assert "Reward of the step's own completions rose by 0.9" in text
    (lowest,) = (sentence for sentence in summary(run) if sentence.step is not None)
    assert lowest.step == 10 and lowest.text == (
        "Step 10 lowered the entropy most: −0.1 ± 0.003, 33.3 standard errors from 0."
    )


def test_the_summary_gives_no_share_of_what_is_noise(tmp_path):
    row = {"entropy/delta_measured": -0.001, "entropy/delta_measured_stderr": 0.01,
           "entropy/delta_linear": 0.0, "entropy/delta_linear_stderr": 0.01, "entropy/delta_momentum": 1}  # fmt: skip
    text = summary(load_run(run_of(tmp_path, [row] * 3)))[0].text
    assert "which is within two standard errors of 0" in text and "momentum" not in text
    assert pd.isna(view(load_run(run_of(tmp_path / "b", [row])), "steps")["step"]).sum() == 0


def test_a_run_without_numbers_has_no_summary(tmp_path):
    assert summary(load_run(run_of(tmp_path, [{"loss": 0.25}]))) == []
