"""The reference path with the shipped YAMLs, small: SFT, its adapter, RL with every probe, evaluation; two ranks."""

import json
from pathlib import Path

import pytest
from launching import REPOSITORY, launch

from trl_entropy.runs.directory import RunDirectory

pytestmark = pytest.mark.slow

GSM8K = REPOSITORY.parent / "shared" / "data" / "gsm8k"
RUN_MODULE = Path(__file__).with_name("run_module.py")
# Sizes only; everything else is what a person with two H100s runs.
SIZES = ["--dataset_name", str(GSM8K), "--max_prompt_length", "600"]
SIZES += ["--bf16", "False", "--dtype", "float32", "--use_cpu", "True"]
SFT_SIZES = [
    "--num_demonstrations",
    "64",
    "--max_length",
    "1000",
    "--per_device_train_batch_size",
    "8",
    "--lora_r",
    "8",
]
RL_SIZES = [
    "--num_train_problems", "64", "--num_prompts_per_step", "8", "--num_generations", "4", "--max_steps", "3",
    "--per_device_train_batch_size", "8", "--max_completion_length", "24", "--num_eval_problems", "8",
    "--per_device_eval_batch_size", "8", "--num_generations_eval", "2", "--eval_steps", "3", "--save_steps", "3",
]  # fmt: skip
EVERY_PROBE = [
    "--entropy_probe_every", "1", "--entropy_probe_completions", "held_out", "--entropy_probe_num_completions", "16",
    "--entropy_second_order", "True",
    "--entropy_placebo", "True", "--optimizer_state_probe_every", "1", "--kl_every", "1",
]  # fmt: skip


def run(engine: str, module: str, config: str, directory: Path, *settings: str) -> None:
    arguments = ["--config", str(REPOSITORY / "configs" / config), "--output_dir", str(directory), *SIZES, *settings]
    result = launch(engine, RUN_MODULE, module, *arguments, scratch=directory.parent / "ops", timeout=500)
    assert result.returncode == 0, result.stdout[-6000:]


def test_from_a_base_model_to_an_evaluated_policy(model_path, tmp_path):
    if not GSM8K.exists():
        pytest.skip("no ../shared/data/gsm8k beside this checkout: the records are not part of the repository")
    adapter, policy = tmp_path / "sft", tmp_path / "rl"
    run("ddp-cpu", "sft", "sft-qwen2.5-1.5b-gsm8k.yaml", adapter, "--model_name_or_path", model_path, *SFT_SIZES)
    assert json.loads((adapter / "environment.json").read_text())["num_processes"] == 2
    start = ["--model_name_or_path", str(adapter)]
    run("zero2-cpu", "train", "qwen2.5-1.5b-gsm8k.yaml", policy, *start, *RL_SIZES, *EVERY_PROBE)
    log = RunDirectory(policy)
    rows = log.metrics()
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert json.loads((policy / "environment.json").read_text())["num_processes"] == 2
    for row in rows:
        assert {"entropy/delta_measured", "entropy/delta_second_order", "ess/loss_weights", "kl"} <= row.keys()
        assert row["entropy/num_completions"] == 16 and row["completions/mean_length"] <= 24
    assert rows[0]["kl"] == pytest.approx(0, abs=1e-9)
    assert [row["step"] for row in log.evaluation()] == [0, 3]
    assert len(list((policy / "probes" / "entropy").glob("*.safetensors"))) == 3
    assert (policy / "checkpoint-3" / "adapter_model.safetensors").exists()
    assert (policy / "report" / "training.png").stat().st_size > 10_000
