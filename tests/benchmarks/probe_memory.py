"""
Peak memory of each whole probe in a step of training, against doctor's formula.

    OMP_NUM_THREADS=1 PYTHONPATH=tests python -m benchmarks.probe_memory [--hidden 1536] [--full] [PROBE ...]

A Qwen2 of two layers with a vocabulary of 151,936 trains for two steps of 16 completions, with LoRA of rank 8 on all
layers or in full, one probe at a time. The peak is that of the second step while the probe works, above what was
allocated when the step began: what torch's allocator gives out on a CPU, from its own profiler. The gradients are in
both numbers.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
from typing import Any
from unittest import mock

import torch
from datasets import Dataset
from peft import LoraConfig
from torch.profiler import ProfilerActivity, profile, record_function
from transformers import Qwen2Config, Qwen2ForCausalLM, TrainerCallback
from trl import ModelConfig

from trl_entropy import DrGRPOConfig, DrGRPOTrainer
from trl_entropy.models.embedded import build_tokenizer
from trl_entropy.preflight.estimate import estimate
from trl_entropy.preflight.hardware import this_machine
from trl_entropy.preflight.launch import Launch
from trl_entropy.preflight.plan import Plan
from trl_entropy.preflight.shapes import model_shape
from trl_entropy.runs.console import quiet_libraries
from trl_entropy.tasks.arguments import TaskArguments

HELD_OUT = {
    "entropy_probe": True, "entropy_probe_completions": "held_out", "entropy_probe_num_completions": 8,
}  # fmt: skip
PROBES: dict[str, dict[str, Any]] = {
    "held_out": HELD_OUT,
    "held_out, second order": HELD_OUT | {"entropy_second_order": True},
    "held_out, attribution": HELD_OUT | {"entropy_attribution": "sequence"},
    "held_out, 64 completions": HELD_OUT | {"entropy_probe_num_completions": 64},
    "next_rollouts": {"entropy_probe": True},
    "rollouts": {"entropy_probe": True, "entropy_probe_completions": "rollouts"},
    "noise_scale_probe": {"noise_scale_probe": True},
    "fisher_probe": {"fisher_probe": True, "fisher_num_sequences": 12},
    "entropy_control": {
        "entropy_control": "report", "entropy_control_target": 0.3, "entropy_control_completions": "probe",
        "entropy_control_num_completions": 8,
    },
    "optimizer_state_probe": {"optimizer_state_probe": True},
}  # fmt: skip
WORKS = "a probe works"


class Watch(TrainerCallback):
    """Profiles the second step, and keeps its peak, bytes, between the marks that `watch` sets."""

    def __init__(self) -> None:
        self.record: Any = None
        self.mark: Any = None
        self.peak = 0

    def watch(self, trainer: DrGRPOTrainer) -> None:
        runner: Any = trainer.probe_runner
        drawn, ready = runner.rollouts_drawn, runner.gradients_ready

        def rollouts_drawn(*args: Any, **kwargs: Any) -> None:
            with record_function(WORKS):
                drawn(*args, **kwargs)

        def gradients_ready() -> None:
            self.mark = record_function(WORKS).__enter__()
            ready()

        runner.rollouts_drawn, runner.gradients_ready = rollouts_drawn, gradients_ready

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        if state.global_step == 1:
            self.record = profile(activities=[ProfilerActivity.CPU], profile_memory=True).__enter__()

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.mark.__exit__(None, None, None)
        if state.global_step == 2:
            self.record.__exit__(None, None, None)
            self.peak = peak_while_marked(self.record.profiler.kineto_results.events())


def peak_while_marked(events: list) -> int:
    marks = [(event.start_ns(), event.start_ns() + event.duration_ns()) for event in events if event.name() == WORKS]
    memory = sorted((event for event in events if event.name() == "[memory]"), key=lambda event: event.start_ns())
    live = itertools.accumulate(event.nbytes() for event in memory)
    inside = (any(start <= event.start_ns() <= end for start, end in marks) for event in memory)
    return max(itertools.compress(live, inside))


def policy(hidden: int, tokenizer) -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    heads = hidden // 128 if hidden >= 256 else 4
    config = Qwen2Config(
        vocab_size=151_936, hidden_size=hidden, intermediate_size=hidden * 35 // 6, num_hidden_layers=2,
        num_attention_heads=heads, num_key_value_heads=max(1, heads // 6), tie_word_embeddings=True, pad_token_id=0,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    return Qwen2ForCausalLM(config)


def measured_and_planned(hidden: int, full: bool, settings: dict[str, Any]) -> tuple[int, int]:
    """Bytes."""
    tokenizer = build_tokenizer()
    prompts = [f"{name} has {i} apples and {j} pears." for name in ("Ann", "Ben") for i in range(5) for j in range(5)]
    lengths = {len(tokenizer(prompt)["input_ids"]) for prompt in prompts}
    adapter = None if full else LoraConfig(r=8, target_modules="all-linear", lora_dropout=0.0)
    with tempfile.TemporaryDirectory() as folder:
        policy(hidden, tokenizer).save_pretrained(f"{folder}/model")
        tokenizer.save_pretrained(f"{folder}/model")
        args = DrGRPOConfig(
            output_dir=f"{folder}/run", max_steps=2, num_generations=4, per_device_train_batch_size=16,
            max_completion_length=24, bf16=False, gradient_checkpointing=False, use_cpu=True, save_strategy="no",
            report_to="none", disable_tqdm=True, seed=0, **settings,
        )  # fmt: skip
        watch = Watch()
        trainer = DrGRPOTrainer(
            model=f"{folder}/model", reward_funcs=distinct_tokens, args=args, processing_class=tokenizer,
            train_dataset=Dataset.from_dict({"prompt": prompts}), peft_config=adapter, callbacks=[watch],
        )  # fmt: skip
        watch.watch(trainer)
        trainer.train()
        return watch.peak, planned(trainer.args, f"{folder}/model", full, max(lengths))


def distinct_tokens(completion_ids: list[list[int]], **columns: Any) -> list[float]:
    return [float(sum(ids) % 7) for ids in completion_ids]


def planned(args: DrGRPOConfig, path: str, full: bool, prompt_length: int) -> int:
    """Doctor's bytes of the probe's phase."""
    launch = Launch(engine="plain", num_processes=1, num_asked=1, source="this benchmark", use_cpu=True)
    return sum(planned_items(args, path, full, prompt_length, launch).values())


def planned_items(args: DrGRPOConfig, path: str, full: bool, prompt_length: int, launch: Launch) -> dict[str, int]:
    model = ModelConfig(model_name_or_path=path, use_peft=not full, lora_r=8, lora_target_modules=["all-linear"])
    plan = Plan(TaskArguments(), args, model, launch, this_machine(use_cpu=True), model_shape(model))
    with mock.patch.object(Plan, "prompt_length", prompt_length):
        phases = estimate(plan).phases
    (phase,) = [items for name, items in phases.items() if name not in ("generation", "loss and backward")]
    return phase


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=1536)
    parser.add_argument("--full", action="store_true", help="train all parameters instead of an adapter")
    parser.add_argument("probes", nargs="*", help="; ".join(PROBES))
    options = parser.parse_args()
    quiet_libraries()
    print("| probe | measured (GiB) | doctor (GiB) | ratio |\n|---|---|---|---|")
    for name in options.probes or PROBES:
        got, expected = measured_and_planned(options.hidden, options.full, PROBES[name])
        print(f"| {name} | {got / 2**30:.3f} | {expected / 2**30:.3f} | {expected / got:.2f} |", flush=True)


if __name__ == "__main__":
    main()
