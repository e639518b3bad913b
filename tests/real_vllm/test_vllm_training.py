"""Training with a real vLLM in the process: it draws with the step's weights, and the probes weigh by its numbers."""

import math
import shutil

import pytest
import torch
from run_rows import without_clocks
from safetensors.torch import load_file
from vllm_runs import (
    LORA,
    NEEDS_VLLM,
    NO_PROBES,
    drawn_by_the_policy,
    mean_difference,
    policy,
    probe_file,
    scores,
    train,
    weighted_entropy,
)

from trl_entropy.runs.directory import RunDirectory
from trl_entropy.runs.self_checks import failed_self_checks

pytestmark = NEEDS_VLLM

HELD_OUT = {
    "entropy_probe_completions": "held_out",
    "entropy_probe_sampler": "vllm",
    "entropy_probe_num_completions": 64,
}
RUNS = {
    "full, held out": HELD_OUT,
    "lora, next rollouts": {**LORA, "entropy_attribution": "token"},
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Four steps of each of `RUNS`, trained when first asked for."""
    made = {}

    def run(name) -> RunDirectory:
        if name not in made:
            path = tmp_path_factory.mktemp("vllm") / "run"
            train(path, **RUNS[name])
            made[name] = RunDirectory(path)
        return made[name]

    return run


@pytest.mark.parametrize("name", RUNS)
def test_vllm_draws_with_the_weights_of_the_step(runs, warm_start_dir, name):
    """Its log-probabilities are the present policy's up to bfloat16, and far from those of the start."""
    run = runs(name)
    rows, metadata = probe_file(run, 3)
    drawn_at = 3 if metadata["drawn"] == "after the step" else 2
    from_now, from_start = (
        mean_difference(scores(policy(run, step, str(warm_start_dir)), rows)[1], rows, rows["sampling_logps"])
        for step in (drawn_at, 0)
    )
    print(f"{name}: vLLM differs from the policy by {from_now:.4f} nats a token, from the start by {from_start:.4f}")
    assert metadata["sampler"] == "vllm"
    assert 0 < from_now < 0.02 and from_start > 5 * from_now
    for row in run.metrics():
        assert 0 < row["sampling/sampling_logp_difference/mean"] < 0.02
        assert row["sampling/importance_sampling_ratio/mean"] == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("name", RUNS)
def test_the_change_is_weighted_by_vllms_log_probabilities(runs, warm_start_dir, name):
    """(T6) and (T7) in float64 from the checkpoints and the probe's file."""
    run = runs(name)
    for step in (2, 3):
        rows, _ = probe_file(run, step)
        ends = []
        for point in (step - 1, step):
            entropy, logps = scores(policy(run, point, str(warm_start_dir)), rows)
            ends.append([weighted_entropy(entropy, logps, rows, with_) for with_ in (rows["sampling_logps"], logps)])
        (before, plain_before), (after, _) = ends
        row, count = run.metrics()[step - 1], len(rows["input_ids"])
        assert row["entropy/probe_batch"] == pytest.approx(before, rel=1e-5)
        assert row["entropy/delta_measured"] == pytest.approx(after - before, rel=1e-3)
        assert abs(plain_before - before) > 1e-4 * before, "weights that are all 1 would be noticed"
        assert 0.9 * count < row["entropy/sampler_ess"] < count


def test_e_of_the_next_rollouts_is_what_training_drew(runs):
    """The rows of a step's E are rows of the next step, with the log-probabilities that vLLM told training."""
    run = runs("lora, next rollouts")
    rows, metadata = probe_file(run, 1)
    assert metadata["drawn"] == "after the step"
    path = run.path / "probes" / "rollouts" / "step_000002.safetensors"
    following = {tuple(ids) for ids in load_file(path)["input_ids"].tolist()}
    assert {tuple(ids) for ids in rows["input_ids"].tolist()} <= following


def test_the_mean_over_vllms_draws_is_that_over_the_models_own(runs, tmp_path):
    """Two independent draws of E of the policy before step 1."""
    train(tmp_path / "own", **(HELD_OUT | {"entropy_probe_sampler": "model", "max_steps": 1}))
    own, by_vllm = RunDirectory(tmp_path / "own").metrics()[0], runs("full, held out").metrics()[0]
    assert "entropy/sampler_ess" not in own and by_vllm["entropy/sampler_ess"] > 0
    for name in ("entropy/probe_batch", "entropy/delta_measured", "entropy/delta_linear"):
        stderr = math.hypot(own[f"{name}_stderr"], by_vllm[f"{name}_stderr"])
        assert abs(own[name] - by_vllm[name]) < 4 * stderr, name


def test_probes_leave_training_as_it_is(runs, tmp_path):
    """Bit for bit, also where the probe draws with training's vLLM, whose random numbers are put back."""
    trainer = train(tmp_path / "off", **NO_PROBES)
    run, off = runs("full, held out"), RunDirectory(tmp_path / "off")
    kept = policy(run, 4, "")
    for name, value in trainer.model.named_parameters():
        assert torch.equal(value.double(), kept.get_parameter(name)), name
    for probed, plain in zip(without_clocks(run.metrics()), without_clocks(off.metrics()), strict=True):
        assert plain == {key: value for key, value in probed.items() if key in plain}


@pytest.mark.parametrize("name", RUNS)
def test_resumed_is_uninterrupted(runs, tmp_path, name):
    straight = runs(name)
    later = shutil.ignore_patterns("checkpoint-3", "checkpoint-4")
    path = shutil.copytree(straight.path, tmp_path / "resumed", ignore=later)
    train(path, resume="latest", **RUNS[name])
    resumed = RunDirectory(path)
    assert [start["after_step"] for start in resumed.starts()] == [0, 2]
    if "lora" not in name:
        assert without_clocks(resumed.metrics()) == without_clocks(straight.metrics())
        return
    # To the tolerance of the frozen weights, which TRL's merging for vLLM has rounded in the first two steps of the
    # run that was not interrupted and which the resumed one reads anew (test_generation_facts.py). Same completions.
    for step in (3, 4):
        drawn = [load_file(run.path / "probes" / "rollouts" / f"step_{step:06d}.safetensors")["input_ids"]
                 for run in (straight, resumed)]  # fmt: skip
        assert torch.equal(*drawn)
    for expected, got in zip(straight.metrics(), resumed.metrics(), strict=True):
        for key in ("loss", "reward", "entropy/probe_batch", "entropy/delta_measured", "entropy/delta_linear"):
            assert got[key] == pytest.approx(expected[key], rel=1e-3, abs=2e-5), (expected["step"], key)


def test_all_probes_of_the_steps_own_completions_know_vllms_factor(tmp_path):
    """(T17), noise scale, kernel: what they compute again is what training computed, with TRL's factor in the loss."""
    probes = {"entropy_probe_completions": "rollouts", "noise_scale_probe": True, "fisher_probe": True}
    train(tmp_path / "run", **probes, fisher_num_sequences=16, max_steps=3, learning_rate=3e-4)
    rows = RunDirectory(tmp_path / "run").metrics()
    for row in rows:
        assert row["sampling/importance_sampling_ratio/max"] > 1
        assert failed_self_checks(row) == {}
        assert 0 < row["noise_scale/gradient_error"] < 1e-4
    for row in rows[1:]:  # (T17) begins with the second step
        assert 0 < row["entropy/rollouts_gradient_error"] < 1e-4
    rollouts, _ = probe_file(RunDirectory(tmp_path / "run"), 2)
    assert (rollouts["sampling_logps"] * drawn_by_the_policy(rollouts)).abs().sum() > 0
