"""
Time and memory of a training step of a model of Qwen2.5-1.5B's shape with random weights, without and with each probe.

    python -m tests.benchmarks.gpu                      # one GPU; the table of docs/results.md
    python -m tests.benchmarks.gpu --shape tiny --device cpu --completions 16     # a quick check of the script

Random tokens of random length replace generation, so that a step consists of scoring, backward pass, update and
probes. Training is in bf16 with gradient checkpointing and LoRA on all projections. E is the entropy probe's batch.
"""

from __future__ import annotations

import argparse
import gc
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen2Config, TrainerCallback

from trl_entropy import DrGRPOConfig, DrGRPOTrainer
from trl_entropy.models.embedded import build_tokenizer
from trl_entropy.runs.console import quiet_libraries
from trl_entropy.runs.directory import describe_environment

SHAPES: dict[str, dict[str, int]] = {
    "qwen2.5-1.5b": {
        "vocab_size": 151_936, "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28,
        "num_attention_heads": 12, "num_key_value_heads": 2,
    },
    "tiny": {
        "vocab_size": 512, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2,
    },
}  # fmt: skip
PROMPT = "a prompt of a few words "
PROBES: dict[str, dict[str, Any]] = {
    "toggles off": {},
    "entropy_probe, |E| = 64": {
        "entropy_probe": True,
        "entropy_probe_completions": "held_out",
        "entropy_probe_num_completions": 64,
    },
    "entropy_probe, second order": {
        "entropy_probe": True,
        "entropy_probe_completions": "held_out",
        "entropy_probe_num_completions": 64,
        "entropy_second_order": True,
    },
    "effective_sample_size_probe": {"effective_sample_size_probe": True},
    "optimizer_state_probe": {"optimizer_state_probe": True},
    "kl_every=1": {"kl_every": 1},
}
PROBES["all"] = {name: value for settings in PROBES.values() for name, value in settings.items()}


class Stopwatch(TrainerCallback):
    """Seconds of every step after the first; waits for the device before and after each."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.seconds = device, []

    def on_step_begin(self, args, state, control, **kwargs):
        synchronize(self.device)
        self.start = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        synchronize(self.device)
        if state.global_step > 1:
            self.seconds.append(time.perf_counter() - self.start)
        elif self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


class ReplayTrainer(DrGRPOTrainer):
    """A trainer whose completions are random tokens, with a length within `lengths`, instead of generated."""

    lengths = (200, 500)

    def _generate_single_turn(self, prompt_ids, *args):
        draw = random.Random(self.state.global_step)
        return [[draw.randrange(2, 500) for _ in range(draw.randint(*self.lengths))] for _ in prompt_ids], None


def build_model(shape: str, device: torch.device) -> PreTrainedModel:
    config = Qwen2Config(**SHAPES[shape], tie_word_embeddings=True, max_position_embeddings=2048)
    with device:
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


def build(
    options: argparse.Namespace, rank: int, probes: dict[str, Any], folder: Path
) -> tuple[DrGRPOTrainer, Stopwatch]:
    device = torch.device(options.device)
    watch = Stopwatch(device)
    args = DrGRPOConfig(
        output_dir=str(folder),
        num_generations=8,
        per_device_train_batch_size=options.micro_batch,
        num_prompts_per_step=options.completions // 8,
        max_completion_length=ReplayTrainer.lengths[1],
        max_steps=options.steps + 1,
        learning_rate=1e-6,
        bf16=True,
        use_cpu=device.type == "cpu",
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        save_strategy="no",
        disable_tqdm=True,
        probe_batch_size=4,
        probe_files_keep=0,
        **probes,
    )
    trainer = ReplayTrainer(
        model=build_model(options.shape, device),
        reward_funcs=lambda completion_ids, **kwargs: [float(sum(ids) % 2) for ids in completion_ids],
        args=args,
        train_dataset=Dataset.from_dict({"prompt": [f"{PROMPT}{number}" for number in range(512)]}),
        processing_class=build_tokenizer(),
        peft_config=LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM"),
        callbacks=[watch],
    )
    return trainer, watch


def measure(options: argparse.Namespace, rank: int, name: str) -> tuple[float, float, float]:
    """Median seconds per step, completion tokens per second, and peak memory in GiB."""
    with tempfile.TemporaryDirectory() as folder:
        trainer, watch = build(options, rank, PROBES[name], Path(folder))
        trainer.train()
        tokens = statistics.mean(ReplayTrainer.lengths) * options.completions
    peak = torch.cuda.max_memory_allocated() / 2**30 if options.device == "cuda" else float("nan")
    del trainer
    gc.collect()
    if options.device == "cuda":
        torch.cuda.empty_cache()
    seconds = statistics.median(watch.seconds)
    return seconds, tokens / seconds, peak


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), default="qwen2.5-1.5b")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--completions", type=int, default=256, help="completions per step; a multiple of 8")
    parser.add_argument("--micro-batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=3, help="steps that are measured, after a first one that is not")
    parser.add_argument("--ranks", type=int, nargs="+", default=[16, 64], help="ranks r of LoRA")
    parser.add_argument("--only", nargs="+", choices=list(PROBES), default=list(PROBES))
    options = parser.parse_args(argv)
    quiet_libraries()
    environment = describe_environment()
    device = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
    print(f"{device}, {environment['packages']}, {environment['time']}; {vars(options)}\n", flush=True)
    print("| LoRA r | probes | s/step | ratio | tokens/s | peak GiB |\n|---|---|---|---|---|---|", flush=True)
    for rank in options.ranks:
        base = None
        for name in options.only:
            seconds, speed, peak = measure(options, rank, name)
            base = base or seconds
            print(f"| {rank} | {name} | {seconds:.2f} | {seconds / base:.2f} | {speed:.0f} | {peak:.1f} |", flush=True)


if __name__ == "__main__":
    main()
