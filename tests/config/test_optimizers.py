"""Which optimizers probes take is known from the settings, before a model is loaded."""

import pytest

from trl_entropy import DrGRPOConfig

HELD_OUT = {"entropy_probe": True, "entropy_probe_completions": "held_out", "entropy_probe_num_completions": 8}
SPLITTING = {
    "attribution": HELD_OUT | {"entropy_attribution": "token"},
    "second order": HELD_OUT | {"entropy_second_order": True},
    "kernel": {"fisher_probe": True, "fisher_num_sequences": 16},
    "cross-prompt": {"entropy_probe": True, "entropy_probe_completions": "rollouts"},
    "control": {"entropy_control": "report", "entropy_control_num_completions": 8},
}


def config(tmp_path, **settings):
    sizes = {"num_generations": 4, "per_device_train_batch_size": 16, "bf16": False, "use_cpu": True}
    return DrGRPOConfig(output_dir=str(tmp_path), **(sizes | settings))


@pytest.mark.parametrize("probe", SPLITTING)
def test_what_splits_a_step_needs_an_optimizer_with_a_rule(tmp_path, monkeypatch, probe):
    for optim in ("adamw_torch", "sgd", "rmsprop", "adagrad", "adafactor", "adamw_bnb_8bit"):
        config(tmp_path, optim=optim, **SPLITTING[probe])
    for optim, reason in (
        ("lion_8bit", "sign of momentum"),
        ("rmsprop_bnb_8bit", "quantised"),
        ("apollo_adamw", "project"),
    ):
        with pytest.raises(ValueError, match=rf"(?i)optim='adamw_torch_fused' \(of {optim}: .*{reason}"):
            config(tmp_path, optim=optim, **SPLITTING[probe])
    monkeypatch.setattr(DrGRPOConfig, "fsdp_version", property(lambda self: 2))
    config(tmp_path, **SPLITTING[probe])
    for optim in ("sgd", "adamw_bnb_8bit"):
        with pytest.raises(ValueError, match=f"FSDP spread the state of {optim} over processes"):
            config(tmp_path, optim=optim, **SPLITTING[probe])


def test_measuring_alone_takes_any(tmp_path):
    config(tmp_path, optim="lion_32bit", noise_scale_probe=True, **HELD_OUT)


def test_percentiles_of_moments_need_adams(tmp_path):
    config(tmp_path, optim="adamw_torch", optimizer_state_probe=True)
    for optim in ("sgd", "adamw_bnb_8bit"):
        with pytest.raises(ValueError, match=f"reads Adam's moments, but optim is {optim}"):
            config(tmp_path, optim=optim, optimizer_state_probe=True)
