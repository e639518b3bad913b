"""The resume contract: every setting that changes training is in it, of later versions of TRL too."""

import dataclasses
from fnmatch import fnmatchcase

import pytest

from trl_entropy.config.dr_grpo import DrGRPOConfig
from trl_entropy.config.resume_contract import FREE_UPSTREAM, contract_settings, upstream_settings

FIELDS = [field.name for field in dataclasses.fields(DrGRPOConfig)]


def config(tmp_path, **settings):
    return DrGRPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none", **settings)


def differing(tmp_path, *, base=None, **changed):
    before, after = (contract_settings(config(tmp_path, **{**(base or {}), **settings})) for settings in ({}, changed))
    return {name for name in before.keys() & after.keys() if before[name] != after[name]}  # as a resumption compares


# Those of shared/cases/faults.md that were accepted without a word, and those that review.md names.
@pytest.mark.parametrize(
    "changed",
    [
        {"reward_weights": [1.0, 0.5]},
        {"token_control": "random"},
        {"entropy_control": "hold", "entropy_control_target": 0.5},
        {"top_entropy_quantile": 0.8},
        {"importance_sampling_level": "sequence"},
        {"entropy_coef": 0.01},
        {"delta": 2.0},
        {"multi_objective_aggregation": "normalize_then_sum"},
        {"generation_kwargs": {"typical_p": 0.9}},
        {"ignore_data_skip": True},
        {"sync_ref_model": True, "beta": 0.1},
        {"lr_scheduler_kwargs": {"min_lr": 1e-6}, "lr_scheduler_type": "cosine_with_min_lr"},
        {"stop_at_answer": True},
        {"optim_args": "foreach=False"},
        {"model_init_kwargs": {"dtype": "bfloat16"}},
    ],
    ids=str,
)
def test_what_changes_training_is_compared(tmp_path, changed):
    name = "dtype" if "model_init_kwargs" in changed else next(iter(changed))
    assert name in differing(tmp_path, **changed)


@pytest.mark.parametrize(
    "changed",
    [
        {"logging_steps": 5, "save_steps": 7, "run_name": "x", "save_total_limit": 2},
        {"log_completions": True, "num_completions_to_print": 2},
        {"gradient_checkpointing": True, "dataloader_num_workers": 1},
        {"hub_token": "x", "push_to_hub": False},
        {"model_init_kwargs": {"token": "x", "attn_implementation": "eager"}},
        {"optimizer_state_probe": True, "kl_every": 5, "entropy_control": "report"},
    ],
    ids=str,
)
def test_what_changes_no_number_is_not(tmp_path, changed):
    assert differing(tmp_path, **changed) == set()


def test_the_length_counts_only_where_the_schedule_knows_it(tmp_path):
    decaying, constant = {"lr_scheduler_type": "linear"}, {"lr_scheduler_type": "constant"}
    assert differing(tmp_path, base=decaying, max_steps=9) >= {"max_steps"}
    assert differing(tmp_path, base=decaying, num_train_epochs=9) == {"num_train_epochs"}
    assert differing(tmp_path, base=decaying | {"max_steps": 9}, num_train_epochs=9) == set()
    assert (
        differing(tmp_path, base=constant, max_steps=9)
        == set()
        == differing(tmp_path, base=constant, num_train_epochs=9)
    )


def test_what_stands_elsewhere_is_added_and_what_is_not_known_left_out(tmp_path):
    settings = contract_settings(config(tmp_path), reward_funcs=["a"], engine=None)
    assert settings["reward_funcs"] == ["a"] and "engine" not in settings and settings["world_size"] == 1


def test_every_free_field_is_one_of_the_installed_version():
    unknown = [pattern for pattern in FREE_UPSTREAM if not any(fnmatchcase(name, pattern) for name in FIELDS)]
    assert unknown == []
    assert {"seed", "temperature", "loss_type", "epsilon", "vllm_importance_sampling_cap"} <= set(upstream_settings())
