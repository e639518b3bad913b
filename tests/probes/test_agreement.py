"""`trl-entropy experiment agreement` on runs whose truth is known."""

import json
import random

import pytest

from trl_entropy.estimators.statistics.estimate import Estimate
from trl_entropy.experiment import main
from trl_entropy.experiments.agreement import analyse, end_point, placebo, probed_rows
from trl_entropy.runs.directory import RunDirectory

NUM_STEPS = 36


def a_run(path, slope=1.0, noise=1e-4, seed=0, every=1):
    """A run in which the change is `slope` times its prediction, every number with its stated noise."""
    draw, entropy = random.Random(seed), 0.4
    run = RunDirectory(path)
    for step in range(1, NUM_STEPS + 1):
        predicted = -0.01 * draw.random()
        row = {"loss": 0.0, "entropy/num_completions": 512}
        row["entropy/probe_batch"] = entropy + draw.gauss(0, 1e-3)
        row["entropy/probe_batch_stderr"] = 1e-3
        for name in ("linear", "second_order", "trapezoid", "measured"):
            truth = slope * predicted if name == "measured" else predicted
            row[f"entropy/delta_{name}"], row[f"entropy/delta_{name}_stderr"] = truth + draw.gauss(0, noise), noise
            for half in "ab":
                row[f"entropy/half_{half}_{name}"] = truth + draw.gauss(0, noise)
                row[f"entropy/half_{half}_{name}_stderr"] = noise
        for name in ("cov_natural", "cov_policy_gradient"):
            row[f"entropy/delta_{name}"] = draw.gauss(0, 1)
        if step > 1:
            row["entropy/delta_placebo"] = 3 * predicted + draw.gauss(0, 0.01)
        entropy += slope * predicted
        run.append_metrics(step, row if step % every == 0 else {"loss": 0.0})
    return path


def test_planted_slopes_are_found_and_wrong_ones_are_seen(tmp_path):
    for slope in (1.0, 0.8):
        table = analyse(a_run(tmp_path / str(slope), slope))["across_halves"]
        for part in ("all", "third 1", "third 2", "third 3"):
            found = table[part]["second_order"]["corrected_slope"]
            assert found["low"] < slope < found["high"] and found["stderr"] < 0.05
            assert table[part]["second_order"]["share_of_ceiling"]["value"] == pytest.approx(1, abs=0.02)
        # Measured against measured knows no slope but 1.
        assert table["all"]["measured"]["corrected_slope"]["value"] == pytest.approx(1, abs=0.02)


def test_the_integral_leaves_the_fresh_entropies_when_predictions_are_wrong(tmp_path):
    right = analyse(a_run(tmp_path / "right"))["integral"]["second_order"]
    wrong = analyse(a_run(tmp_path / "wrong", slope=0.8))["integral"]["second_order"]
    assert right["share_within_2_stderr"] > 0.7 and abs(right["largest_deviation"]) < 4
    assert wrong["largest_deviation"] < -10


def test_the_placebo_explains_nothing_that_the_prediction_left_over(tmp_path):
    found = placebo(probed_rows(a_run(tmp_path)))
    low, high = found["raw"].interval()
    assert not low < 0 < high  # it shares the trend
    assert abs(found["left_over"].value) < 4 * found["left_over"].stderr < 0.1


def test_end_point_compares_sums_with_the_fresh_change(tmp_path):
    rows = probed_rows(a_run(tmp_path))
    start, last = rows[0]["entropy/probe_batch"], rows[-1]["entropy/probe_batch"] + rows[-1]["entropy/delta_measured"]
    result = end_point(rows, (Estimate(start, 1e-3, 99.0, 100), Estimate(last, 1e-3, 99.0, 100)))
    assert result["change"] == pytest.approx(last - start)
    for name in ("linear", "second_order", "trapezoid", "measured"):
        assert result[name]["ratio"] == pytest.approx(1, abs=4 * result[name]["ratio_stderr"])
        # 36 changes of error 1e-4 each, and two entropies of error 1e-3
        assert result[name]["ratio_stderr"] == pytest.approx(
            (NUM_STEPS * 1e-8 + 2e-6) ** 0.5 / abs(last - start), rel=0.05
        )


def test_changes_of_every_third_step_are_not_summed_as_if_they_were_all(tmp_path, capsys):
    """Perfect predictions: their sum over a third of the steps is no prediction of the whole change."""
    path = a_run(tmp_path / "sparse", every=3)
    result = analyse(path)
    assert result["num_steps"] == 12 and result["integral"]["num_unprobed"] == 22
    assert set(result["integral"]) == {"num_unprobed", "steps", "fresh", "fresh_stderr", "fresh_num_prompts"}
    assert result["across_halves"]["all"]["linear"]["corrected_slope"]["value"] == pytest.approx(1, abs=0.1)
    main(["agreement", str(path), "--output", str(tmp_path)])
    output = capsys.readouterr().out
    assert "sparse: 22 of the steps 3 to 36 were not probed" in output and "largest deviation" not in output
    with pytest.raises(SystemExit, match="24 of 36 steps were not probed"):
        main(["agreement", str(path), "--fresh-completions", "8"])


def test_a_run_whose_first_steps_were_not_probed_has_sums_but_no_end_points(tmp_path):
    path = a_run(tmp_path / "late")
    run = RunDirectory(path)
    rows = [row if row["step"] > 2 else {"step": row["step"], "loss": 0.0} for row in run.metrics()]
    run.metrics_path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "linear" in analyse(path)["integral"]
    with pytest.raises(ValueError, match="2 of 36 steps were not probed"):
        analyse(path, num_fresh=8)


def test_command_prints_tables_and_draws(tmp_path, capsys):
    main(["agreement", str(a_run(tmp_path / "a")), str(a_run(tmp_path / "b", seed=1)), "--output", str(tmp_path)])
    output = capsys.readouterr().out
    assert "| a | third 3 | second_order |" in output and "| b | all |" in output and "fresh entropy" not in output
    widths = {line.count("|") for table in output.split("\n\n")[:1] for line in table.splitlines()}
    assert widths == {9}
    assert len(json.loads((tmp_path / "agreement.json").read_text())) == 2
    assert (tmp_path / "agreement.png").stat().st_size > 10_000


def test_too_few_steps_and_a_missing_checkpoint_are_said(tmp_path):
    with pytest.raises(SystemExit, match="0 steps probed on completions other than its own; 9 or more are needed"):
        main(["agreement", str(tmp_path)])
    with pytest.raises(SystemExit, match="no checkpoint of its last step, 36; train with save_strategy=steps"):
        main(["agreement", str(a_run(tmp_path / "a")), "--fresh-completions", "8"])
