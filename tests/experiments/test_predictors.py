"""The table of predictors on a run whose measured changes are made from one of them."""

import json

import numpy as np
import pytest
import torch

from trl_entropy.analysis.run import load_run
from trl_entropy.estimators.entropy_change.published import published_predictions
from trl_entropy.experiments import predictors
from trl_entropy.runs.step_files import write_probe_file
from trl_entropy.runs.strict_json import to_line

STEPS, SCALE = 30, 0.1


def write_step(path, step, generator):
    """Its files; returns what the formulas say of it."""
    mask = torch.arange(5) < torch.randint(1, 6, (8, 1), generator=generator)
    logps, entropy = (-torch.rand(8, 5, generator=generator), 2 * torch.rand(8, 5, generator=generator))
    advantages = torch.randn(8, generator=generator)
    masks = {"completion_mask": mask, "prompt_index": torch.arange(8)}
    scores = {"logps_before": logps, "entropy_before": entropy}
    write_probe_file(path, "likelihood", step, masks | scores, {}, None)
    ids = torch.ones(8, 7, dtype=torch.int32)
    rollouts = {"input_ids": ids, "advantages": advantages}
    write_probe_file(path, "rollouts", step, masks | rollouts, {}, None)
    return published_predictions(logps, entropy, advantages, mask)


def write_run(path, seed=0, num_steps=STEPS):
    """Changes are those of `centred` times 0.1, with errors of a tenth of their spread; ours have such errors too."""
    generator, noise = torch.Generator().manual_seed(seed), np.random.default_rng(seed)
    path.mkdir(parents=True)
    truth = []
    for step in range(1, num_steps + 1):
        truth.append(SCALE * write_step(path, step, generator)["centred"])
    error = float(np.std(truth)) / 10
    with open(path / "metrics.jsonl", "w") as file:
        for step, value in enumerate(truth, start=1):
            first, second, whole = value + error * noise.standard_normal(3)
            file.write(to_line({
                "step": step, "entropy/half_b_measured": first, "entropy/half_b_measured_stderr": error,
                "entropy/half_a_linear": second, "entropy/half_a_linear_stderr": error,
                "entropy/delta_measured": whole,
            }) + "\n")  # fmt: skip
    return path


def test_the_predictor_that_made_the_changes_is_found(tmp_path, capsys):
    runs = [write_run(tmp_path / name, seed) for seed, name in enumerate(("one", "two"))]
    predictors.main([*map(str, runs), "--output", str(tmp_path / "out")])
    printed = capsys.readouterr().out
    table = json.loads((tmp_path / "out" / "predictors.json").read_text())
    assert list(table) == ["one", "two", "one + two"] and list(table["one + two"]) == list(table["one"])
    for parts in table.values():
        found = parts["all"]
        assert found["centred"]["correlation"]["value"] > 0.98
        assert found["centred"]["share_of_ceiling"]["value"] == pytest.approx(1, abs=0.05)
        assert found["linear"]["slope"]["low"] < 1 < found["linear"]["slope"]["high"]
        assert found["linear"]["sign"]["value"] > 0.9 and found["centred"]["slope"] is None
        # Draws are independent over steps, so that the past says nothing.
        assert abs(found["last_step"]["correlation"]["value"]) < 0.5
        known = {name: found[name]["known"] for name in ("last_step", "centred", "linear")}
        assert known == {"last_step": "past", "centred": "before", "linear": "after"}  # E is the next step's rollouts
        assert "discriminator_exact" not in found  # nothing of the whole distribution was written
    seeds = table["one + two"]["all"]["centred"]["over_seeds"]
    assert seeds["low"] < table["one"]["all"]["centred"]["correlation"]["value"] < seeds["high"]
    assert table["one"]["all"]["last_step"]["num_steps"] == STEPS - 1
    assert table["one"]["all"]["line"]["num_steps"] == STEPS - 3
    assert "trapezoid" not in table["one"]["all"]  # it was not logged
    assert printed.index("-A (log p + H) |") < printed.index("the step before")
    assert (tmp_path / "out" / "predictors.png").stat().st_size > 10_000


def test_whole_distributions_have_formulas_of_their_own(tmp_path):
    path = write_run(tmp_path / "run", num_steps=9)
    (path / "config.yaml").write_text("entropy_probe_completions: held_out\n")
    run, means = load_run(path), 0.2 * torch.rand(8, 5, generator=torch.Generator().manual_seed(1))
    for step in run.probe_steps("likelihood"):
        arrays = {name: torch.from_numpy(values.copy()) for name, values in run.probe_file("likelihood", step).items()}
        write_probe_file(path, "likelihood", step, arrays | {"mean_discriminator_before": means}, {}, None)
    steps = predictors.steps_of(run)
    rollouts, scores = run.probe_file("rollouts", 4), run.probe_file("likelihood", 4)
    own = scores["completion_mask"]
    s = np.exp(scores["logps_before"]) * (scores["logps_before"] + scores["entropy_before"])
    terms = (-rollouts["advantages"][:, None] * (s - means.numpy()))[own]
    found = steps[3].predictions
    assert found["discriminator_exact"][0] == pytest.approx(terms.mean(), rel=1e-5)
    assert found["raising"][0] == pytest.approx(terms[terms > 0].sum() / len(terms), rel=1e-5)
    assert found["lowering"][0] == pytest.approx(terms[terms < 0].sum() / len(terms), rel=1e-5)
    assert steps[3].known["linear"] == "before" and steps[3].known["discriminator_exact"] == "before"


def test_runs_are_taken_together_if_they_differ_in_the_seed_alone(tmp_path):
    runs = [load_run(write_run(tmp_path / str(seed), seed, 9)) for seed in range(3)]
    for run, rate in zip(runs, (1, 2, 1), strict=True):
        (run.path / "config.yaml").write_text(
            f"learning_rate: {rate}\nseed: {run.path.name}\noutput_dir: {run.path}\n"
            f"model_config: {{_name_or_path: warm_start-seed{run.path.name}}}\n"
        )
    assert [[run.path.name for run in same] for same in predictors.alike(runs)] == [["0", "2"], ["1"]]
    found = predictors.over_seeds([0.5, 0.7])
    z = np.arctanh([0.5, 0.7])
    assert found["value"] == pytest.approx(np.tanh(z.mean()))
    assert np.arctanh(found["high"]) - z.mean() == pytest.approx(12.7062 * z.std(ddof=1) / np.sqrt(2), rel=1e-4)


def test_the_line_through_the_past_goes_on_straight():
    past = [(step, 3.0 - 0.5 * step) for step in range(1, 30)]
    found = predictors._from_the_past(30, past)
    assert found == {"last_step": 3.0 - 0.5 * 29, "line": pytest.approx(3.0 - 0.5 * 30)}
    # Only the last ten count
    assert predictors._from_the_past(30, [(1, 1e6), *past[-10:]])["line"] == pytest.approx(found["line"])
    assert predictors._from_the_past(2, past[:1]) == {"last_step": 2.5}


@pytest.mark.parametrize("lacking", ["likelihood", "steps"])
def test_a_run_without_its_files_is_refused_in_one_line(tmp_path, lacking):
    run = write_run(tmp_path / "run", num_steps=12 if lacking == "likelihood" else 8)
    if lacking == "likelihood":
        for file in (run / "probes" / "likelihood").iterdir():
            file.unlink()
    with pytest.raises(SystemExit, match=r"9 or more are needed\. Train with entropy_probe and likelihood_probe"):
        predictors.main([str(run)])


def test_advantages_by_token_are_refused(tmp_path):
    run = write_run(tmp_path / "run", num_steps=9)
    path = run / "probes" / "rollouts" / "step_000004.safetensors"
    arrays = load_run(run).probe_file("rollouts", 4)
    path.unlink()
    tensors = {name: torch.from_numpy(np.array(values)) for name, values in arrays.items()}
    write_probe_file(run, "rollouts", 4, tensors | {"advantages": torch.ones(8, 5)}, {}, None)
    with pytest.raises(SystemExit, match="token_control changes the advantages of tokens"):
        predictors.main([str(run)])
