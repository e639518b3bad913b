"""
Peak memory of each kind of pass that probes make, against the formula by which they are planned and doctor estimates.

    OMP_NUM_THREADS=1 python tests/benchmarks/pass_memory.py [--rows 8] [--completion 24]

A Qwen2 of two layers with the sizes of Qwen2.5-1.5B, a vocabulary of 151,936 and LoRA of rank 8 on all layers; the
prompts have 50 tokens. The peak is what torch's allocator gives out on a CPU above what it had given before, from its
own profiler: what kernels allocate for themselves is in it.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial

import torch
from measuring import peak_memory
from peft import LoraConfig, get_peft_model
from transformers import Qwen2Config, Qwen2ForCausalLM

from trl_entropy.engine.parameters import evaluation_mode
from trl_entropy.estimators.rows.row_sums import SquaredNorms
from trl_entropy.gradients.footprint import Differentiated
from trl_entropy.gradients.head_chunks import can_split
from trl_entropy.gradients.memory import pass_over
from trl_entropy.gradients.scores import score
from trl_entropy.gradients.sequence_products import consumed, gradients_of, weighted_entropies, weighted_logps
from trl_entropy.rollouts.completions import Completions

PROMPT = 50


def build() -> torch.nn.Module:
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=151_936, hidden_size=1536, intermediate_size=8960, num_hidden_layers=2, num_attention_heads=12,
        num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    return get_peft_model(Qwen2ForCausalLM(config), LoraConfig(r=8, target_modules="all-linear")).eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--completion", type=int, default=24)
    options = parser.parse_args()
    rows, width, model = options.rows, options.completion, build()
    ids = torch.randint(1, 1000, (rows, PROMPT + width))
    ones = torch.ones_like(ids)
    ones[0, 0] = 0  # one row is padded
    completions = Completions(ids, ones, ones[:, -width:], torch.arange(rows), loss_mask=ones[:, -width:])
    direction = {name: torch.ones_like(p) for name, p in model.named_parameters() if p.requires_grad}
    value, entropies = (weighted(torch.ones(rows, width)) for weighted in (weighted_logps, weighted_entropies))
    scored = partial(score, model, completions, 1.0, rows, None, direction)
    passes: list[tuple[str, Callable[[], object], int, Differentiated]] = [
        *((f"order {n}", partial(scored, n), n, "") for n in range(3)),
        ("gradient", lambda: gradients_of(model, completions, [entropies], 1.0, rows), 0, "entropies"),
        ("each one's", lambda: consumed(model, completions, value, lambda: SquaredNorms(rows), 1.0, rows), 0, "logps"),
    ]
    assert can_split(model, completions)
    whole = rows * width * 151_936 / 2**28
    print(f"{rows} completions of {width} tokens; a tensor of all logits would take {whole:.2f} GiB")
    with evaluation_mode(model):
        for name, function, order, backward in passes:
            one = pass_over(model, completions, order, backward)
            assert one is not None
            measured, formula = peak_memory(function) / 1024, one.num_bytes(rows) / 2**30
            print(f"{name:10s} {measured:.3f} GiB, formula {formula:.3f}, ratio {formula / measured:.2f}", flush=True)


if __name__ == "__main__":
    main()
