"""Defaults, derived sizes, and errors that come before any model is loaded and say what to change."""

import re
from types import SimpleNamespace

import pytest
from transformers import HfArgumentParser

from trl_entropy import DrGRPOConfig

CPU = {"output_dir": "unused", "bf16": False, "use_cpu": True, "gradient_checkpointing": False}


def config(**settings):
    return DrGRPOConfig(**(CPU | settings))


def test_defaults_are_dr_grpo_on_the_full_distribution():
    args = config()
    assert (args.loss_type, args.scale_rewards, args.beta) == ("dr_grpo", "none", 0.0)
    assert (args.top_k, args.top_p, args.temperature, args.min_p) == (0, 1.0, 1.0, None)
    assert args.logging_steps == 1 and not args.logging_nan_inf_filter
    assert args.truncated_sampling() == ""
    assert args.enabled_probes() == []


@pytest.mark.parametrize(("prompts", "micro_batch", "steps"), [(16, 128, 1), (16, 64, 2), (16, 8, 16), (1, 8, 1)])
def test_num_prompts_per_step_sets_the_accumulation(prompts, micro_batch, steps):
    args = config(num_prompts_per_step=prompts, per_device_train_batch_size=micro_batch, num_generations=8)
    assert args.gradient_accumulation_steps == steps
    assert args.generation_batch_size == prompts * 8


def test_num_prompts_per_step_counts_processes():
    args = config(per_device_train_batch_size=32, num_generations=8)
    args.num_prompts_per_step = 16
    args._set_accumulation(world_size=2)
    assert args.gradient_accumulation_steps == 2


def proposals(error) -> list[int]:
    return [
        int(size)
        for size in re.search(r"per_device_train_batch_size=(\d+)(?: or (\d+))?,", str(error)).groups()
        if size
    ]


@pytest.mark.parametrize(
    "sizes",
    [
        {"num_prompts_per_step": 15, "per_device_train_batch_size": 64},
        {"num_prompts_per_step": 3, "per_device_train_batch_size": 16},
        {"per_device_train_batch_size": 12},
        {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2},
    ],
)
def test_sizes_that_do_not_divide_are_refused_with_sizes_that_do(sizes):
    with pytest.raises(ValueError) as error:
        config(num_generations=8, **sizes)
    for size in proposals(error.value):
        config(num_generations=8, **(sizes | {"per_device_train_batch_size": size}))


def test_proposed_number_of_prompts_divides():
    with pytest.raises(ValueError, match="num_prompts_per_step a multiple of 8") as error:
        config(num_generations=8, num_prompts_per_step=15, per_device_train_batch_size=64)
    assert proposals(error.value)
    config(num_generations=8, num_prompts_per_step=16, per_device_train_batch_size=64)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_generations": 1}, "num_generations is 1.*2 or more"),
        (
            {"num_prompts_per_step": 16, "per_device_train_batch_size": 64, "gradient_accumulation_steps": 4},
            "needs gradient_accumulation_steps=2.*Remove one",
        ),
        ({"length_normalizer": "longest"}, "length_normalizer is 'longest'; use one of"),
        ({"length_normalizer": "group_max", "loss_type": "dapo"}, "means nothing for loss_type='dapo'"),
        ({"kl_every": -1}, "kl_every is -1"),
        ({"optimizer_state_probe": True, "optimizer_state_probe_every": 0}, "optimizer_state_probe_every is 0"),
        ({"use_transformers_continuous_batching": True, "bf16": True}, "casts the trained float32 weights"),
        ({"stop_at_answer": True, "mask_truncated_completions": True}, "stop_at_answer.*mask_truncated_completions"),
    ],
)
def test_refused_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        config(**settings)


def test_kl_is_refused_where_parameters_are_sliced(monkeypatch):
    args = config(kl_every=1)
    args.deepspeed_plugin = SimpleNamespace(zero_stage=2)
    args._check_probes()
    args.deepspeed_plugin = SimpleNamespace(zero_stage=3)
    with pytest.raises(ValueError, match=r"kl_every.*ZeRO-3.*kl_every=0.*zero_stage: 2"):
        args._check_probes()
    args.beta = 0.1  # TRL's own KL, by its reference model
    args._check_probes()
    args.beta, args.deepspeed_plugin = 0.0, None
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    with pytest.raises(ValueError, match=r"kl_every.*FSDP splits.*kl_every=0.*zero_stage: 2"):
        args._check_probes()


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"top_k": 50}, "top_k=50"),
        ({"top_p": 0.9}, "top_p=0.9"),
        ({"min_p": 0.1}, "min_p=0.1"),
        ({"repetition_penalty": 1.1}, "repetition_penalty=1.1"),
        ({"generation_kwargs": {"top_k": 20}}, "top_k=20"),
        ({"generation_kwargs": {"typical_p": 0.5}}, "typical_p=0.5"),
        ({"generation_kwargs": {"typical_p": 1.0}}, ""),
        ({"generation_kwargs": {"no_such_setting": 1}}, "no_such_setting=1"),
        ({"top_k": None}, "top_k=50"),  # transformers' own default
        ({"use_vllm": True, "vllm_structured_outputs_regex": "[0-9]"}, "vllm_structured_outputs_regex=[0-9]"),
    ],
)
def test_truncated_sampling_is_found(settings, named):
    assert config(**settings).truncated_sampling() == named


def test_vllm_stops_at_the_answer_and_its_sampler_needs_it():
    probe = {"entropy_probe": True, "entropy_probe_completions": "held_out"}
    args = config(use_vllm=True, stop_at_answer=True, entropy_probe_sampler="vllm", **probe)
    assert args.generation_kwargs == {"stop": ["</answer>"], "include_stop_str_in_output": True}
    assert args.truncated_sampling() == ""
    with pytest.raises(ValueError, match="entropy_probe_sampler='vllm' needs use_vllm=True"):
        config(entropy_probe_sampler="vllm", **probe)
    with pytest.raises(ValueError, match="entropy_probe_sampler is 'vlm'; use one of"):
        config(entropy_probe_sampler="vlm", **probe)


def test_a_server_of_vllm_is_refused_on_a_cpu():
    """TRL refuses it too, but only after it has waited for the server and built the model."""
    with pytest.raises(ValueError, match=r"over NCCL, which needs a GPU\. Set vllm_mode='colocate'"):
        config(use_vllm=True, vllm_mode="server", use_cpu=True)


def test_help_of_every_field_prints():
    """argparse takes `%` in a help text for a format."""
    text = HfArgumentParser(DrGRPOConfig).format_help()
    assert all(f"--{name}" in text for name in ("fisher_sketch_dim", "noise_scale_probe", "entropy_probe_every"))


def test_without_a_gpu_the_config_names_both_settings(tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: False)
    with pytest.raises(ValueError, match="On a CPU set use_cpu=True and bf16=False") as error:
        DrGRPOConfig(output_dir=str(tmp_path))
    assert "\n" not in str(error.value)
    DrGRPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False)
