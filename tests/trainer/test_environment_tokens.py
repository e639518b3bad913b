"""Tokens of an environment are context: whatever the model would give them, no number of a run changes."""

import math

import pandas
import pytest
import torch
from environment_rollouts import ENVIRONMENT, environment_tokens, score_environment_with_garbage, two_turns
from first_fast import first_fast
from safetensors.torch import load_file

from trl_entropy.analysis.attribution import attribution_table, own_rows
from trl_entropy.analysis.run import load_run
from trl_entropy.runs.change_metrics import KINDS, TURNS
from trl_entropy.runs.directory import RunDirectory

ALWAYS = {"weight_decay": 0.1, "effective_sample_size_probe": True, "probe_batch_size": 5}
HELD_OUT = {"entropy_probe": True, "entropy_probe_completions": "held_out", "entropy_probe_num_completions": 4}
FISHER = {"fisher_probe": True, "fisher_num_sequences": 12}
NOISE = {"noise_scale_probe": True}
SETTINGS = {
    "held out": HELD_OUT | {"entropy_attribution": "token", "entropy_second_order": True, "entropy_placebo": True},
    "by sequence": {"entropy_attribution": "sequence", "beta": 0.1, "num_iterations": 2}
    | HELD_OUT
    | {"importance_sampling_level": "sequence"},
    "own completions": {"entropy_probe": True, "entropy_probe_completions": "rollouts", "kl_every": 1} | FISHER,
    "noise": NOISE | {"noise_scale_within_prompt": True},
    "micro-batches": NOISE | {"noise_scale_from": "micro_batches", "gradient_accumulation_steps": 2},
    "sketch": FISHER | {"fisher_sketch_dim": 64, "length_normalizer": "group_max"},
    "next rollouts": {"entropy_probe": True, "entropy_probe_completions": "next_rollouts", "max_steps": 2}
    | {"entropy_attribution": "token", "entropy_probe_num_completions": 16},
    "bonus": HELD_OUT | {"entropy_attribution": "token", "entropy_coef": 0.1, "top_entropy_quantile": 0.5},
    "control by own": {"entropy_control": "hold", "entropy_control_target": 5.0}
    | {"entropy_control_completions": "rollouts"},
    "control by probe": {
        "entropy_control": "hold",
        "entropy_control_target": 5.0,
        "entropy_control_num_completions": 4,
    },
    "clip-cov": {"token_control": "clip_cov", "token_control_bounds": [-10.0, 10.0], "token_control_fraction": 0.2}
    | {"token_control_scope": "micro_batch"},
    "kl-cov": {"token_control": "kl_cov", "token_control_fraction": 0.2, "token_control_scope": "optimizer_batch"},
}


def run_of(make_trainer, garbage: bool, **settings):
    trainer = make_trainer(rollout_func=two_turns, **({"max_steps": 3} | ALWAYS | settings))
    if garbage:
        score_environment_with_garbage(trainer.model)
        if trainer.ref_model is not None:
            score_environment_with_garbage(trainer.ref_model)
    trainer.train()
    return RunDirectory(trainer.args.output_dir), trainer.model.state_dict()


def numbers(run: RunDirectory) -> list[dict]:
    kept = [
        {key: value for key, value in row.items() if not key.startswith(("time/", "step_time"))}
        for row in run.metrics()
    ]
    return [{key: "nan" if isinstance(x, float) and math.isnan(x) else x for key, x in row.items()} for row in kept]


def differing(clean: RunDirectory, garbage: RunDirectory) -> list[str]:
    """Keys of which some step's numbers differ, with the first that do."""
    pairs = [
        (key, one.get(key), other.get(key))
        for one, other in zip(numbers(clean), numbers(garbage), strict=True)
        for key in sorted(one.keys() | other.keys())
    ]
    return [f"{key}: {one} and {other}" for key, one, other in pairs if one != other]


@pytest.mark.parametrize("name", first_fast(SETTINGS))
def test_what_the_model_gives_environment_tokens_changes_nothing(make_trainer, name):
    (clean, weights), (garbage, others) = (
        run_of(make_trainer, garbage, **SETTINGS[name]) for garbage in (False, True)
    )
    assert differing(clean, garbage) == []
    if name == "by sequence":  # by token a drawn padding token is another one in forward mode
        assert all(abs(row["entropy/attribution_rounding"]) < 1e-5 for row in clean.metrics())
    assert all(torch.equal(weights[key], others[key]) for key in weights)
    files = sorted(path.relative_to(clean.path) for path in clean.path.glob("probes/*/*.safetensors"))
    assert files or not any("probe" in key for key in SETTINGS[name])
    for path in files:
        one, other = (load_file(run.path / path) for run in (clean, garbage))
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one if one[key].isfinite().all()), path
        if "completion_mask" in one:
            assert "loss_mask" in one, f"{path} has completions without tokens of the environment"
            width = one["loss_mask"].shape[1]
            written = environment_tokens(one["input_ids"])[:, -width:] if "input_ids" in one else None
            assert written is None or torch.equal(written, one["completion_mask"].bool() & ~one["loss_mask"].bool())


def test_the_garbage_is_seen_where_masks_are_wrong(make_trainer, monkeypatch):
    """The test above can fail: with the mask of attention in place of the loss's it does."""
    monkeypatch.setattr("trl_entropy.trainer.probed.loss_mask_of", lambda batch: batch["completion_mask"])
    clean, garbage = (run_of(make_trainer, garbage, max_steps=1)[0] for garbage in (False, True))
    assert any(line.startswith("entropy/policy:") for line in differing(clean, garbage))
    assert clean.metrics()[0]["reward"] == garbage.metrics()[0]["reward"], "both drew the same completions"
    assert len(ENVIRONMENT) == 3


def files_of(run: RunDirectory, probe: str) -> dict:
    (path,) = (run.path / "probes" / probe).glob("*.safetensors")
    return load_file(path)


@pytest.mark.parametrize("source", ["held_out", "rollouts"])
def test_means_and_lengths_are_over_the_policys_tokens(make_trainer, source):
    probes = FISHER | (HELD_OUT if source == "held_out" else {"entropy_probe": True})
    scale = {} if source == "rollouts" else {"length_normalizer": "group_max"}
    probes |= {"entropy_probe_completions": source}
    run, _ = run_of(make_trainer, False, max_steps=1, **probes, **scale)
    (row,), file, rollouts = run.metrics(), files_of(run, "entropy"), files_of(run, "rollouts")
    own = file["loss_mask"]
    assert row["entropy/probe_batch"] == pytest.approx(float((file["entropy_before"] * own).sum() / own.sum()))
    weights = ((file["logps_after"] - file["logps_before"]) * own).double()
    weights = (weights.cumsum(1) - weights).exp() * own
    change = float((file["entropy_after"] * weights).sum() / weights.sum()) - row["entropy/probe_batch"]
    measured = "entropy/delta_measured" if source == "held_out" else "entropy/delta_in_sample"
    assert row[measured] == pytest.approx(change, abs=1e-6)
    lengths, kernel = rollouts["loss_mask"].sum(1), files_of(run, "fisher")
    assert torch.equal(kernel["lengths"], lengths[kernel["rows"]])
    assert row["completions/mean_length"] == pytest.approx(float(lengths.float().mean()))
    longest = lengths.view(-1, 4).amax(1).repeat_interleave(4) if scale else torch.full_like(lengths, 12)
    weights = (1 / longest.double())[rollouts["advantages"] != 0]
    assert row["ess/loss_weights"] == pytest.approx(float(weights.sum() ** 2 / weights.square().sum()))
    table = load_run(run.path).tokens
    assert table[["row", "position"]].to_numpy().tolist() == own.nonzero().tolist()


def test_shares_of_tokens_are_of_the_policys(make_trainer):
    settings = HELD_OUT | {"entropy_attribution": "token"}
    run, _ = run_of(make_trainer, False, max_steps=1, **settings)
    (row,), file, rollouts = run.metrics(), files_of(run, "attribution"), files_of(run, "rollouts")
    own = file["loss_mask"].bool() & (file["raw_advantages"] != 0)[:, None]
    rare = (file["logps"] < math.log(0.1)) & own & (file["raw_advantages"] > 0)[:, None]
    assert row["entropy/token_share_correct_rare"] == pytest.approx(float(rare.sum() / own.sum()))
    written = rollouts["completion_mask"].bool() & ~rollouts["loss_mask"].bool()
    assert written.any()
    for name in ("attribution", "loss_coefficients", "logps", "entropy"):
        assert (file[name][written] == 0).all(), name


def test_parts_by_turn_and_by_kind_sum_to_the_whole(make_trainer):
    settings = HELD_OUT | {"entropy_attribution": "token", "token_control": "kl_cov", "token_control_fraction": 0.1}
    run, _ = run_of(make_trainer, False, max_steps=2, **settings)
    for row in run.metrics():
        for names in (TURNS, KINDS):
            parts = [row.get(f"entropy/delta_{name}", 0.0) for name in names]
            assert sum(parts) == pytest.approx(row["entropy/delta_gradient"], rel=1e-9)
            shares = [row.get(f"entropy/share_{name}", 0.0) for name in names]
            assert sum(shares) == pytest.approx(1)
        assert row["entropy/delta_turn_1"] != 0 != row["entropy/delta_turn_2"]
        assert "entropy/delta_turn_3" not in row
    table = attribution_table(load_run(run.path))
    of_step = table[table["step"] == 1].groupby("turn")["attribution"].sum()
    assert of_step["turn_2"] == pytest.approx(run.metrics()[0]["entropy/delta_turn_2"], rel=1e-6)
    whole = attribution_table(load_run(run.path), context=True)
    assert len(whole) > len(table)
    pandas.testing.assert_frame_equal(own_rows(whole).drop(columns="own"), table, check_dtype=False)


def test_entropy_by_turn_is_over_each_turns_tokens(make_trainer):
    run, _ = run_of(
        make_trainer, False, max_steps=1, **FISHER, entropy_probe=True, entropy_probe_completions="rollouts"
    )
    (row,), file = run.metrics(), files_of(run, "entropy")
    first = file["loss_mask"].bool() & (file["loss_mask"].cumsum(1) == torch.arange(1, file["loss_mask"].shape[1] + 1))
    second = file["loss_mask"].bool() & ~first
    for name, mask in (("turn_1", first), ("turn_2", second)):
        assert row[f"entropy/{name}"] == pytest.approx(float(file["entropy_before"][mask].mean()), rel=1e-5)


@pytest.mark.parametrize("source", ["probe", "rollouts"])
def test_the_controlled_entropy_is_the_policys(make_trainer, source):
    settings = {"entropy_control": "report", "entropy_control_completions": source}
    settings |= {"entropy_control_num_completions": 4} if source == "probe" else {}
    run, _ = run_of(make_trainer, False, max_steps=1, **settings)
    (row,) = run.metrics()
    assert row["entropy_control/entropy"] == pytest.approx(
        row["entropy/policy"], rel=1e-5 if source == "rollouts" else 0.01
    )


def test_the_kl_spreads_over_the_policys_tokens(make_trainer):
    """TRL's correction of the KL by the ratio of a whole completion; without advantages there is nothing else."""
    terms = {"beta": 0.1, "num_iterations": 2, "importance_sampling_level": "sequence", "loss_type": "grpo"}
    settings = HELD_OUT | terms | {"entropy_attribution": "token", "learning_rate": 1e-2, "max_steps": 3}
    trainer = make_trainer(
        rollout_func=two_turns, reward_funcs=lambda completion_ids, **_: [1.0] * len(completion_ids), **settings
    )
    generator = torch.Generator().manual_seed(0)
    for param in trainer.model.parameters():  # away from the reference
        param.data += 0.01 * torch.randn(param.shape, generator=generator)
    trainer.train()
    for row in RunDirectory(trainer.args.output_dir).metrics():
        assert abs(row["entropy/delta_gradient"]) < 1e-5 * abs(row["entropy/delta_kl"])
