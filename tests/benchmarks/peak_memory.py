"""
Peak memory of training at a vocabulary of 151,936 entries, as the system counts it, with and without the probe.

    OMP_NUM_THREADS=1 python tests/benchmarks/peak_memory.py

A Qwen2 with two layers of hidden size 64 trains for two steps of 64 completions of 96 tokens, in micro-batches of 4,
alone and then with `entropy_probe=True` and that probe's defaults. Each is a process of its own, whose peak is what
the system counts as resident (`ru_maxrss`), with the 0.6 GiB that Python and its libraries take.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
from typing import Any

VOCABULARY = 151_936


def train(settings: dict[str, Any]) -> None:
    """Two steps in this process."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from trl_entropy import DrGRPOConfig, DrGRPOTrainer
    from trl_entropy.models.embedded import build_tokenizer
    from trl_entropy.runs.console import quiet_libraries
    from trl_entropy.tasks.word_problems import load_word_problems

    quiet_libraries()
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=VOCABULARY, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=True, pad_token_id=0,
            bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
        )
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        args = DrGRPOConfig(
            output_dir=f"{folder}/run", max_steps=2, num_generations=4, per_device_train_batch_size=4,
            num_prompts_per_step=16, max_completion_length=96, bf16=False, gradient_checkpointing=False, use_cpu=True,
            save_strategy="no", report_to="none", disable_tqdm=True, seed=0, **settings,
        )  # fmt: skip
        DrGRPOTrainer(
            model=model,
            reward_funcs=lambda completions, **columns: [float(len(text) % 7) for text in completions],
            args=args,
            train_dataset=load_word_problems("train", 512, seed=0),
            processing_class=tokenizer,
        ).train()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--child", choices=("off", "on"), help="train in this process and print its peak")
    child = parser.parse_args().child
    if child is not None:
        train({"entropy_probe": child == "on"})
        print(f"PEAK {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.3f}")
        return
    for name, title in (("off", "training alone"), ("on", "with entropy_probe=True")):
        done = subprocess.run([sys.executable, __file__, "--child", name], capture_output=True, text=True, check=True)
        print(f"{title}: {float(done.stdout.split('PEAK')[1]):.2f} GiB", flush=True)


if __name__ == "__main__":
    main()
