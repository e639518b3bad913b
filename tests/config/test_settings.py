"""One source for a setting: nothing is left out of help, page and resume contract."""

import dataclasses
from pathlib import Path

import pytest
from trl import GRPOConfig

from trl_entropy import DrGRPOConfig
from trl_entropy.config.document import document
from trl_entropy.config.resume_contract import contract_settings, upstream_settings
from trl_entropy.config.setting import default_of, own_settings
from trl_entropy.control import EntropyControl
from trl_entropy.estimators.control.entropy_control import SetPoint
from trl_entropy.probes import PROBES

SETTINGS = own_settings(DrGRPOConfig)
UPSTREAM = {field.name for field in dataclasses.fields(GRPOConfig)}
CPU = {"output_dir": "unused", "bf16": False, "use_cpu": True, "gradient_checkpointing": False}
TARGET = {"entropy_control": "hold", "entropy_control_target": 0.3}


def contract(planned=None, **settings):
    return contract_settings(DrGRPOConfig(**(CPU | settings)), **(planned or {}))


def test_every_field_of_ours_is_a_setting():
    assert set(SETTINGS) == {field.name for field in dataclasses.fields(DrGRPOConfig)} - UPSTREAM


def test_the_page_is_up_to_date():
    """Else: python -m trl_entropy.config.document > docs/toggles.md"""
    page = (Path(__file__).parents[2] / "docs" / "toggles.md").read_text(encoding="utf-8")
    assert page == document() + "\n"
    assert all(page.count(f"| `{name}` | ") >= 1 for name in SETTINGS)


@pytest.mark.parametrize("name", SETTINGS)
def test_a_setting_is_described(name):
    """Whole sentences; `changes_training` has no default, so that nobody forgets it."""
    described, default = SETTINGS[name], default_of(DrGRPOConfig, name)
    assert described.help[0].isupper() or described.help.startswith(("clip_cov", "kl_cov"))
    assert described.help.endswith(".")
    assert not described.choices or default in described.choices
    assert not described.probe or described.probe in SETTINGS
    assert bool(described.logs) == bool(described.cost)


def test_every_toggle_says_what_it_logs_and_costs():
    toggles = set(PROBES) | {setting.probe for setting in SETTINGS.values() if setting.probe}
    toggles |= {"curriculum", "resample_uninformative_groups", "kl_every", "evaluate_checkpoints"}
    assert all(SETTINGS[name].logs and SETTINGS[name].cost for name in toggles)
    assert all(f"{name}_every" in SETTINGS and SETTINGS[name].probe == name for name in PROBES)


@pytest.mark.parametrize("name", [name for name, setting in SETTINGS.items() if setting.choices])
def test_every_choice_is_checked(name):
    first = f"{name} is 'no such'; use one of {', '.join(SETTINGS[name].choices)}"
    with pytest.raises(ValueError, match=first):
        DrGRPOConfig(**CPU, **{name: "no such"})


def test_probes_change_nothing_and_controls_do():
    assert not any(setting.changes_training for name, setting in SETTINGS.items() if setting.probe in PROBES)
    assert all(setting.changes_training for setting in SETTINGS.values() if setting.probe.endswith("_control"))


# ---- the resume contract


def test_the_contract_has_what_changes_training():
    names = {name for name, setting in SETTINGS.items() if setting.changes_training}
    controlled = {"token_control": "random", **TARGET}
    known = {"engine", "world_size", "dtype"}
    assert set(contract(**controlled, max_steps=-1)) == names | set(upstream_settings()) | known
    assert set(upstream_settings()) <= UPSTREAM
    assert contract(planned={"world_size": 3, "engine": None})["world_size"] == 3
    assert "engine" not in contract(planned={"engine": None})


def test_a_control_that_is_off_may_be_set_anew():
    plain = contract()
    assert plain["entropy_control"] == plain["token_control"] == "none" and "token_control_fraction" not in plain
    assert contract(entropy_control="report", entropy_control_num_completions=16) == plain
    args = DrGRPOConfig(**CPU)
    args.entropy_control_gain, args.token_control_fraction = 0.1, 0.5  # at construction they are refused
    assert contract_settings(args) == plain
    held = contract(**TARGET)
    assert held["entropy_control"] == "hold" and held["entropy_control_target"] == 0.3
    assert contract(**TARGET, entropy_control_gain=0.1) != held


def test_the_length_of_a_run_counts_where_the_learning_rate_follows_it():
    assert contract(max_steps=7, lr_scheduler_type="linear")["max_steps"] == 7
    assert "max_steps" not in contract(max_steps=7, lr_scheduler_type="constant")
    longer = {"additional_steps": 2, "resume_from_checkpoint": "latest"}
    assert "max_steps" not in contract(max_steps=7, lr_scheduler_type="linear", **longer)


# ---- what is no setting


def test_numbers_that_are_no_settings_have_the_defaults_of_their_classes():
    control = EntropyControl.from_config(DrGRPOConfig(**CPU, **TARGET))
    assert control.set_point == SetPoint(0.3, gain=0.4, integral_gain=0.1, max_change=0.02)
    assert (control.cap, control.metric_floor) == (1.0, 0.1)
