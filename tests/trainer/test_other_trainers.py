"""Probes with other trainers of TRL: training is theirs bit for bit, and numbers are those of their loss."""

from dataclasses import dataclass

import pytest
import torch
from first_fast import first_fast
from run_rows import without_clocks
from transformers import Trainer
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer
from trl.experimental.gmpo import GMPOConfig, GMPOTrainer

from trl_entropy import (
    DrGRPOConfig,
    DrGRPOTrainer,
    ProbedConfig,
    ProbedGMPOConfig,
    ProbedGMPOTrainer,
    ProbedRLOOConfig,
    ProbedRLOOTrainer,
    ProbedTrainer,
)
from trl_entropy.rollouts.groups import group_numbers, whole_group_shuffling
from trl_entropy.runs.directory import RunDirectory

KINDS = {
    "rloo": (ProbedRLOOTrainer, ProbedRLOOConfig, RLOOTrainer, RLOOConfig),
    "gmpo": (ProbedGMPOTrainer, ProbedGMPOConfig, GMPOTrainer, GMPOConfig),
}
PROBES = {
    "entropy_probe": True,
    "entropy_attribution": "sequence",
    "noise_scale_probe": True,
    "effective_sample_size_probe": True,
    "optimizer_state_probe": True,
    "kl_every": 1,
}


def flat(model) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])


def with_whole_groups(kind):
    """TRL's trainer with the shuffle that `ProbedTrainer` has too."""

    class WithWholeGroups(kind):
        def _prepare_inputs(self, batch):
            with whole_group_shuffling():
                return super()._prepare_inputs(batch)

        def _generate_and_score_completions(self, inputs):
            batch = super()._generate_and_score_completions(inputs)
            numbers = group_numbers(len(inputs), self.num_generations, 0, self.accelerator.device)
            return batch | {"prompt_index": numbers}

    return WithWholeGroups


def rows_of(trainer) -> list[dict]:
    return RunDirectory(trainer.args.output_dir).metrics()


@pytest.fixture(scope="module")
def runs():
    return {}


@pytest.fixture
def run(make_trainer, runs):
    """Three steps of two micro-batches by each kind of trainer, trained once: parameters, rows."""

    def get(name, how):
        if (name, how) not in runs:
            probed, config, theirs, their_config = KINDS[name]
            kind, config = (with_whole_groups(theirs), their_config) if how == "trl" else (probed, config)
            # Twice as many prompts as a step has, so that the probe's own can be drawn.
            more = PROBES | {"entropy_probe_completions": "next_rollouts"} if how == "probes" else {}
            trainer = make_trainer(
                kind, config, max_steps=3, gradient_accumulation_steps=2, per_device_train_batch_size=8, **more
            )
            trainer.train()
            runs[name, how] = flat(trainer.model), [] if how == "trl" else without_clocks(rows_of(trainer))
        return runs[name, how]

    return get


@pytest.mark.parametrize("name", first_fast(KINDS))
def test_training_is_trls_bit_for_bit_with_probes_off_and_on(run, name):
    theirs, _ = run(name, "trl")
    off, off_rows = run(name, "off")
    on, on_rows = run(name, "probes")
    assert torch.equal(off, theirs)
    assert torch.equal(on, theirs)
    assert len(off_rows) == 3
    for off_row, on_row in zip(off_rows, on_rows, strict=True):
        assert off_row.items() <= on_row.items()


@pytest.mark.parametrize("name", first_fast(KINDS))
def test_numbers_are_those_of_the_trainers_loss(run, name):
    """The backward pass says how the loss depends on each score: shares add up, and gradients are the optimizer's."""
    _, rows = run(name, "probes")
    for row in rows[:-1]:  # no prompts are left to measure the last step on
        parts = ("delta_momentum", "delta_weight_decay", "delta_gradient")
        whole = sum(row[f"entropy/{part}"] for part in parts)
        assert whole == pytest.approx(row["entropy/delta_linear"], rel=2e-2, abs=1e-6)
        assert row["noise_scale/gradient_error"] < 1e-3
        assert row["entropy/delta_linear"] == pytest.approx(row["entropy/delta_measured"], rel=0.5, abs=2e-3)
        assert row["ratio/max"] == pytest.approx(1, abs=1e-5)
    assert rows[0]["kl"] == pytest.approx(0, abs=1e-10) and rows[2]["kl"] > 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_shares_add_up_with_a_kl_off_policy(make_trainer, name):
    """GMPO's KL is a term of its loss, RLOO's a part of the reward; at the second iteration ratios are clipped."""
    kind, config, *_ = KINDS[name]
    probe = {"entropy_probe": True, "entropy_attribution": "token", "entropy_probe_completions": "held_out"}
    trainer = make_trainer(
        kind,
        config,
        beta=0.1,
        num_iterations=2,
        max_steps=4,
        adam_epsilon=1e-4,
        entropy_probe_num_completions=4,
        **probe,
    )
    trainer.train()
    rows = rows_of(trainer)
    assert rows[3]["ratio/max"] > 1.001
    for row in rows[2:]:  # in Adam's first steps coordinates move whose gradient is nothing but rounding
        parts = ("delta_momentum", "delta_weight_decay", "delta_gradient")
        whole = sum(row[f"entropy/{part}"] for part in parts) + row.get("entropy/delta_kl", 0.0)
        assert whole == pytest.approx(row["entropy/delta_linear"], rel=2e-3, abs=1e-6)
    assert ("entropy/delta_kl" in rows[3]) == (name == "gmpo")


def run_once(make_trainer, kind, config, **more):
    trainer = make_trainer(
        kind,
        config,
        max_steps=2,
        optim="sgd",
        max_grad_norm=0.0,
        entropy_probe=True,
        entropy_probe_completions="held_out",
        entropy_probe_num_completions=4,
        **more,
    )
    trainer.train()
    return flat(trainer.model), rows_of(trainer)


def test_rloo_is_dr_grpo_where_advantages_are_matched(make_trainer):
    """
    On policy both losses are sums of A_i log pi(y_i). Leave-one-out advantages are G / (G - 1) of the centred ones,
    and (T2) divides by the maximal length L: with SGD the learning rate makes up for both.
    """
    num_generations, max_length = 4, 12
    rate = 5e-2
    rloo, rloo_rows = run_once(make_trainer, ProbedRLOOTrainer, ProbedRLOOConfig, learning_rate=rate, beta=0.0)
    matched = rate * max_length * num_generations / (num_generations - 1)
    grpo, grpo_rows = run_once(make_trainer, DrGRPOTrainer, DrGRPOConfig, learning_rate=matched)
    unmatched, _ = run_once(make_trainer, DrGRPOTrainer, DrGRPOConfig, learning_rate=2 * matched)
    assert torch.allclose(rloo, grpo, rtol=0, atol=1e-6) and not torch.allclose(rloo, unmatched, rtol=0, atol=1e-4)
    for one, other in zip(rloo_rows, grpo_rows, strict=True):
        assert abs(one["entropy/delta_measured"]) > 1e-4
        for key in ("delta_measured", "delta_linear", "delta_trapezoid", "delta_measured_stderr"):
            assert one[f"entropy/{key}"] == pytest.approx(other[f"entropy/{key}"], rel=2e-3, abs=2e-6), key


def test_rloo_off_policy_has_the_ratios_of_the_policy_that_drew(make_trainer):
    """RLOO keeps sums over completions only; at the second iteration the ratios are those to one step before."""
    trainer = make_trainer(ProbedRLOOTrainer, ProbedRLOOConfig, num_iterations=2, kl_every=1, beta=0.0)
    trainer.train()
    first, second = rows_of(trainer)
    assert first["ratio/max"] == pytest.approx(1, abs=1e-5) and second["ratio/max"] > 1.001
    assert second["kl"] > 1e-5


def test_a_run_is_not_mixed_with_another_and_resumes_with_a_warning(make_trainer, tmp_path, caplog):
    settings = {
        "save_strategy": "steps",
        "save_steps": 1,
        "output_dir": str(tmp_path / "run"),
        "noise_scale_probe": True,
    }

    def made():
        return make_trainer(ProbedRLOOTrainer, ProbedRLOOConfig, max_steps=2, **settings)

    straight = made()
    straight.train()
    with pytest.raises(ValueError, match="already holds a run of 2 steps"):
        made().train()
    resumed = made()
    resumed.train(str(tmp_path / "run" / "checkpoint-1"))
    assert "what NoiseScaleProbe add up over the run begins anew" in caplog.text
    assert torch.equal(flat(resumed.model), flat(straight.model))
    assert [row["step"] for row in rows_of(resumed)] == [1, 2]


# ---- what is refused


class Halved(GRPOTrainer):
    """A loss that nobody knows."""

    def _compute_loss(self, model, inputs):
        return super()._compute_loss(model, inputs) / 2


class ProbedHalved(ProbedTrainer, Halved):
    pass


@dataclass
class ProbedGRPOConfig(ProbedConfig, GRPOConfig):
    pass


def test_a_loss_of_the_users_own_keeps_the_probes_that_hold_for_any(make_trainer):
    trainer = make_trainer(
        ProbedHalved,
        ProbedGRPOConfig,
        entropy_probe=True,
        entropy_probe_completions="held_out",
        entropy_probe_num_completions=4,
        max_steps=1,
    )
    trainer.train()
    (row,) = rows_of(trainer)
    assert row["entropy/delta_linear"] == pytest.approx(row["entropy/delta_measured"], rel=0.5, abs=2e-3)


@pytest.mark.parametrize("probe", ["noise_scale_probe", "rollouts"])
def test_a_loss_of_the_users_own_refuses_what_needs_a_sum_over_groups(make_trainer, probe):
    settings = (
        {"entropy_probe": True, "entropy_probe_completions": "rollouts"} if probe == "rollouts" else {probe: True}
    )
    with pytest.raises(ValueError, match=r"another trainer than Halved, whose loss is not known to be such a sum"):
        make_trainer(ProbedHalved, ProbedGRPOConfig, scale_rewards="none", **settings)


class ProbedSupervised(ProbedTrainer, Trainer):
    pass


@pytest.mark.parametrize(
    ("kind", "config", "error", "settings"),
    [
        (ProbedSupervised, ProbedGRPOConfig, "ProbedSupervised derives from neither GRPOTrainer nor RLOO", {}),
        (ProbedRLOOTrainer, RLOOConfig, "args is a RLOOConfig; a ProbedTrainer needs one that has the probes'", {}),
        (
            None,
            ProbedRLOOConfig,
            "entropy_control is 'hold': it changes training",
            {"entropy_control": "hold"},
        ),
        (None, ProbedRLOOConfig, "curriculum is 'pass_rate': it changes training", {"curriculum": "pass_rate"}),
        (None, ProbedRLOOConfig, "normalize_advantages=True divides", {"normalize_advantages": True}),
        (None, ProbedRLOOConfig, "RLOOTrainer has a loss of its own", {"noise_scale_within_prompt": True}),
        (None, ProbedGMPOConfig, "GMPOTrainer has a loss of its own", {"noise_scale_within_prompt": True}),
        (None, ProbedRLOOConfig, "RLOOTrainer keeps no log-probabilities of vLLM", {"use_vllm": True}),
        (None, ProbedGMPOConfig, "not read by GMPOTrainer's loss, which has no", {"entropy_coef": 0.1}),
    ],
)
def test_what_is_refused_by_name(make_trainer, kind, config, error, settings):
    needs_probe = config is not RLOOConfig and kind is None
    more = {"noise_scale_probe": True, "scale_rewards": "none"} if needs_probe else {}
    if config is ProbedRLOOConfig:
        more.pop("scale_rewards", None)
    with pytest.raises((TypeError, ValueError), match=error):
        make_trainer(kind or ProbedRLOOTrainer, config, **more, **settings)
