"""
Seconds that `preflight/work.py` computes against seconds that this CPU takes, pass by pass.

    OMP_NUM_THREADS=1 python tests/benchmarks/computed_cost.py [--hidden 768 --layers 4 --vocab 32000 --rounds 7]

First the CPU's own rates: matrix products in float32, and memory read and written by a long sum. Then a Qwen2 with
random weights scores completions, with their derivatives, goes backward and generates, with LoRA (rank 16 on every
linear layer) and without. Computed are FLOPs over the one rate plus bytes over the other, all of it (share 1).
Seconds are those of the CPU, one thread, so that what else runs on the machine counts less.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable
from functools import partial

import torch
from measuring import seconds
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import Qwen2Config, Qwen2ForCausalLM
from trl import ModelConfig

from trl_entropy.gradients.group_gradients import token_scores
from trl_entropy.gradients.scores import score
from trl_entropy.preflight import memory
from trl_entropy.preflight.hardware import Rates
from trl_entropy.preflight.shapes import ModelShape, model_shape
from trl_entropy.preflight.work import Model, Work
from trl_entropy.rollouts.completions import Completions

ROWS, PROMPT, NEW = 4, 64, 64
LENGTH = PROMPT + NEW
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("hidden", 768), ("layers", 4), ("vocab", 32000), ("rounds", 7)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    torch.manual_seed(0)
    rates = own_rates(options.rounds)
    print(f"products in float32: {rates.float32 / 1e9:.0f} GFLOP/s; memory: {rates.memory / 1e9:.1f} GB/s")
    print("| pass | products, GFLOP | moved, GB | computed, s | measured, s | computed / measured |")
    print("|---|---|---|---|---|---|")
    for lora in (False, True):
        model, shape = build(options, lora)
        for name, work, call in passes(model, shape):
            call()
            measured = statistics.median(seconds(call)[0] for _ in range(options.rounds))
            computed = work.seconds(rates, share=1.0)
            flops = sum(work.flops.values()) / 1e9
            print(
                f"| {name}, {'LoRA' if lora else 'full'} | {flops:.0f} | {work.memory / 1e9:.2f} | {computed:.3f} | "
                f"{measured:.3f} | {computed / measured:.2f} |",
                flush=True,
            )


def own_rates(rounds: int) -> Rates:
    """FLOP/s of a product of (512, 2048) and (2048, 2048), and bytes/s of the sum of two tensors of 256 MB."""
    a, b, out = torch.randn(512, 2048), torch.randn(2048, 2048), torch.empty(512, 2048)
    x, y, z = torch.randn(2**26), torch.randn(2**26), torch.empty(2**26)
    products = partial(torch.mm, a, b, out=out)
    sums = partial(torch.add, x, y, out=z)
    products(), sums()
    flops = 2 * 512 * 2048**2 / statistics.median(seconds(products)[0] for _ in range(5 * rounds))
    moved = 3 * x.nbytes / statistics.median(seconds(sums)[0] for _ in range(rounds))
    return Rates(flops, flops, flops, moved, moved)


def build(options: argparse.Namespace, lora: bool) -> tuple[nn.Module, ModelShape]:
    hidden = options.hidden
    config = Qwen2Config(
        vocab_size=options.vocab, hidden_size=hidden, intermediate_size=4 * hidden, num_hidden_layers=options.layers,
        num_attention_heads=hidden // 64, num_key_value_heads=hidden // 256, tie_word_embeddings=True,
    )  # fmt: skip
    model = Qwen2ForCausalLM(config)
    if lora:
        model = get_peft_model(model, LoraConfig(r=16, target_modules=TARGETS, task_type="CAUSAL_LM"))
        model.enable_input_require_grads()
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        asked = ModelConfig(folder, use_peft=lora, lora_r=16, lora_target_modules=TARGETS)
        return model.eval(), model_shape(asked)


def passes(model: nn.Module, shape: ModelShape) -> list[tuple[str, Work, Callable[[], object]]]:
    """Each pass with its computed work."""
    ids, ones = torch.randint(0, shape.vocab_size, (ROWS, LENGTH)), torch.ones(ROWS, LENGTH, dtype=torch.long)
    completions = Completions(ids, ones, ones[:, :NEW], torch.arange(ROWS), loss_mask=ones[:, :NEW])
    trained = {name: param for name, param in model.named_parameters() if param.requires_grad}
    params = {name: param.detach() for name, param in trained.items()}
    direction = {name: 1e-3 * torch.randn_like(param) for name, param in params.items()}
    sizes = Model.of(shape)
    assert sizes is not None

    def scored(order: int) -> object:
        return score(model, completions, 1.0, ROWS, params, direction if order else None, order)

    def backward() -> object:
        entropy, logps = token_scores(model, completions, 1.0)
        return torch.autograd.grad((entropy + logps).sum(), list(trained.values()))

    def generate() -> object:
        return model.generate(
            input_ids=ids[:, :PROMPT], attention_mask=ones[:, :PROMPT], do_sample=True, top_k=0, pad_token_id=0,
            max_new_tokens=NEW, min_new_tokens=NEW,
        )  # fmt: skip

    names = ("forward", "first derivative", "second derivative")
    rows = [
        (name, sizes.forward(ROWS, LENGTH, NEW + 1, "float32", n), partial(scored, n)) for n, name in enumerate(names)
    ]
    both = sizes.forward(ROWS, LENGTH, NEW, "float32") + sizes.backward(
        ROWS, LENGTH, NEW, "float32", keeps_logits=ROWS * NEW * shape.vocab_size <= 2**24
    )
    cache, weights = 3 * memory.kv_cache(shape, 1, 1, 4), memory.weights(shape, 4, "none")
    drawn = sizes.prefill(ROWS, PROMPT, "float32") + sizes.decoding(ROWS, PROMPT, NEW, "float32", weights, cache, 18)
    return [*rows, ("forward and backward", both, backward), ("generation", drawn, generate)]


if __name__ == "__main__":
    main()
