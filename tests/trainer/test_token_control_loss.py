"""Clip-Cov, KL-Cov and random tokens in training: what the loss gets, what is logged, what is refused."""

import logging

import pytest
import torch

from trl_entropy import DrGRPOConfig, Probe
from trl_entropy.estimators.token_control import kl_cov_tokens, token_covariances
from trl_entropy.run_log import RunDirectory

CLIP = {"token_control": "clip_cov", "token_control_bounds": [0.2, 0.9], "token_control_quantiles": True,
        "token_control_fraction": 0.1}  # fmt: skip


class Kept(Probe):
    def __init__(self):
        super().__init__()
        self.rollouts, self.inputs, self.gradients = [], [], []

    def on_micro_batch(self, args, state, control, *, inputs, loss_logps, per_token_logps, **kwargs):
        self.inputs.append((inputs, per_token_logps))
        loss_logps.register_hook(self.gradients.append)

    def on_rollouts(self, args, state, control, *, rollouts, **kwargs):
        self.rollouts.append(rollouts)


def trained(make_trainer, **settings):
    kept = Kept()
    trainer = make_trainer(callbacks=[kept], **({"max_steps": 1, "lr_scheduler_type": "constant"} | settings))
    trainer.train()
    return trainer, kept, RunDirectory(trainer.args.output_dir).metrics()


@pytest.mark.parametrize("accumulation", [1, 4])
def test_chosen_tokens_have_no_loss(make_trainer, accumulation):
    """A tenth of the step's tokens, all micro-batches together; every other token as without."""
    settings = {"gradient_accumulation_steps": accumulation, "per_device_train_batch_size": 16 // accumulation}
    _, kept, (row,) = trained(make_trainer, entropy_probe=False, **CLIP, **settings)
    (rollouts,) = kept.rollouts
    mask = rollouts.completion_mask.bool()
    left_out = mask & (rollouts.advantages == 0) & (rollouts.raw_advantages != 0)[:, None]
    zero = int((mask & (rollouts.raw_advantages == 0)[:, None]).sum())
    assert 0 < int(left_out.sum()) <= row["token_control/num_tokens"] == int(0.1 * int(mask.sum()))
    assert int(left_out.sum()) >= row["token_control/num_tokens"] - zero
    others = mask & ~left_out
    assert torch.equal(rollouts.advantages[others], rollouts.raw_advantages[:, None].expand(mask.shape)[others])
    gradients = torch.cat(kept.gradients)
    assert not gradients[left_out].any() and gradients[others & (rollouts.advantages != 0)].all()


def test_kl_cov_holds_the_largest_covariances_to_the_policy_that_sampled(make_trainer):
    """In the second step on the same completions; in the first it does nothing."""
    settings = {"num_iterations": 2, "max_steps": 2, "learning_rate": 1e-2, "entropy_probe": False}
    control = {"token_control": "kl_cov", "token_control_fraction": 0.1, "token_control_coefficient": 3.0}
    _, plain, _ = trained(make_trainer, **settings)
    _, kept, rows = trained(make_trainer, **settings, **control)
    assert torch.equal(kept.gradients[0], plain.gradients[0])
    inputs, logps = kept.inputs[1]
    chosen, old = inputs["token_control_mask"], inputs["old_per_token_logps"]
    covariances = token_covariances(old, inputs["advantages"], inputs["completion_mask"])
    assert torch.equal(chosen, kl_cov_tokens(covariances, int(rows[0]["token_control/num_tokens"])))
    assert torch.equal(logps, plain.inputs[1][1])
    expected = plain.gradients[1] + 3.0 * (logps - old).sign().where(chosen, 0.0) / (16 * 12)
    torch.testing.assert_close(kept.gradients[1], expected, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("control", ["clip_cov", "random"])
def test_probes_go_with_it(make_trainer, control):
    _, _, rows = trained(
        make_trainer, entropy_probe=True, entropy_probe_prompts=4, entropy_attribution="sequence",
        noise_scale_probe=True, **(CLIP | {"token_control": control}),
    )  # fmt: skip
    assert abs(rows[-1]["entropy/attribution_rounding"]) < 1e-5
    assert rows[-1]["noise_scale/gradient_error"] < 1e-4


def test_a_choice_of_nothing_is_said(make_trainer, caplog):
    with caplog.at_level(logging.WARNING, logger="trl_entropy"):
        trained(make_trainer, token_control="clip_cov", token_control_bounds=[1e6, 2e6])
    assert "chose no token" in caplog.text


def test_kl_cov_on_policy_is_warned_of(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="trl_entropy"):
        DrGRPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, token_control="kl_cov")
    assert "does nothing" in caplog.text


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"token_control": "clip"}, "token_control to one of"),
        ({"token_control_fraction": 0.0}, "token_control_fraction"),
        ({"token_control_bounds": [0.5, 0.4]}, "token_control_bounds"),
        ({"token_control_bounds": [0.5, 1.5]}, "token_control_bounds"),
        ({"steps_per_generation": 2}, "steps_per_generation=1"),
        ({"token_control": "kl_cov", "loss_type": "dapo"}, "loss_type='dr_grpo'"),
        ({"token_control": "kl_cov", "noise_scale_probe": True}, "token_control other than 'kl_cov'"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused(settings, message, tmp_path):
    defaults = {"output_dir": str(tmp_path), "use_cpu": True, "bf16": False, "num_generations": 4}
    with pytest.raises(ValueError, match=message):
        DrGRPOConfig(**(defaults | {"per_device_train_batch_size": 16} | CLIP | settings))
