"""
Cost of the LoRA gradient of every sequence of a batch, relative to one plain forward and backward pass of the batch.

    python tests/benchmarks/sequence_gradients.py [--hidden 128 512] [--rounds 8]

The model is a Qwen2 with 8 layers and LoRA of rank 16 on all linear layers, with 32 sequences of 60 tokens, in float32
on the CPU. The methods:

- instead:  hooks write all gradients into a buffer, and autograd computes no weight gradients;
- beside:   the same in addition to autograd's own weight gradients, as in training;
- norms:    as `instead`, but only squared norms are computed and no gradient is kept;
- loop:     a forward and backward pass for each sequence;
- vmap:     torch.func.vmap over torch.func.grad.

In each round every method runs once, in random order, before or after a plain pass of its own, so that changes of the
machine's speed affect both. Times are CPU seconds of the process, which depend less on other load than wall-clock
seconds. Ratios are of paired times, with a 95 % interval (Student's t) over rounds. Memory is the peak of torch's
allocations above what was allocated before, in a first round that is not timed.
"""

from __future__ import annotations

import argparse
import random
import statistics
import warnings

import torch
from measuring import interval, peak_memory, seconds
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import Qwen2Config, Qwen2ForCausalLM

from trl_entropy.engine import trainable_parameters
from trl_entropy.gradients.sequence_gradients import Consumer, Rows, SequenceGradients, SquaredNorms

NUM_SEQUENCES, LENGTH, VOCAB, RANK = 32, 60, 512, 16


def build(hidden: int) -> nn.Module:
    """A model with LoRA whose B is not 0, as it is at the start of training, since A would then have no gradient."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=VOCAB,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=8,
        num_attention_heads=hidden // 32,
        num_key_value_heads=hidden // 64,
        tie_word_embeddings=True,
    )
    lora = LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(Qwen2ForCausalLM(config), lora)
    for name, param in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(param, std=0.02)
    return model


def batch(num_sequences: int) -> Tensor:
    return torch.randint(VOCAB, (num_sequences, LENGTH), generator=torch.Generator().manual_seed(1))


def losses(logits: Tensor, ids: Tensor) -> Tensor:
    """Minus the log-probability of each sequence."""
    return nn.functional.cross_entropy(logits[:, :-1].mT, ids[:, 1:], reduction="none").sum(1)


class Ways:
    """The methods that compute the gradients, as functions without arguments."""

    def __init__(self, model: nn.Module, num_sequences: int = NUM_SEQUENCES) -> None:
        self.model, self.ids = model, batch(num_sequences)
        self.parameters = trainable_parameters(model)
        num_parameters = sum(param.numel() for param in self.parameters.values())
        self.buffer = torch.zeros(num_sequences, num_parameters)

    def plain(self) -> None:
        torch.autograd.grad(self._losses(self.ids).sum(), list(self.parameters.values()))

    def instead(self) -> None:
        self._collect(Rows(len(self.ids), out=self.buffer), weight_gradients=False)

    def beside(self) -> None:
        self._collect(Rows(len(self.ids), out=self.buffer), weight_gradients=True)

    def norms(self) -> None:
        self._collect(SquaredNorms(len(self.ids)), weight_gradients=False)

    def loop(self) -> None:
        params = list(self.parameters.values())
        for row, ids in zip(self.buffer, self.ids.split(1), strict=True):
            grads = torch.autograd.grad(self._losses(ids).sum(), params)
            torch.cat([grad.flatten() for grad in grads], out=row)

    def vmap(self) -> None:
        params = {name: param.detach() for name, param in self.parameters.items()}
        grads = torch.func.vmap(torch.func.grad(self._loss_of_one), in_dims=(None, 0))(params, self.ids)
        torch.cat([grads[name].flatten(1) for name in params], dim=1, out=self.buffer)

    def _losses(self, ids: Tensor) -> Tensor:
        return losses(self.model(input_ids=ids, use_cache=False).logits, ids)

    def _loss_of_one(self, params: dict[str, Tensor], ids: Tensor) -> Tensor:
        inputs = {"input_ids": ids[None], "use_cache": False}
        return losses(torch.func.functional_call(self.model, params, (), inputs).logits, ids[None]).sum()

    def _collect(self, consumer: Consumer, weight_gradients: bool) -> None:
        with SequenceGradients(self.model, consumer, weight_gradients=weight_gradients) as collector:
            values = self._losses(self.ids).sum()
            with collector.batch(torch.arange(len(self.ids))):
                if weight_gradients:
                    torch.autograd.grad(values, list(self.parameters.values()))
                else:
                    values.backward()


def report(name: str, pairs: list[tuple[float, float]], memory: float) -> None:
    ratios = [way / plain for way, plain in pairs]
    mean, _, high = interval(ratios)
    print(
        f"  {name:8} {mean:7.3f} +- {high - mean:.3f} of a plain pass "
        f"(median {statistics.median(way for way, _ in pairs) * 1e3:.0f} ms against "
        f"{statistics.median(plain for _, plain in pairs) * 1e3:.0f} ms), peak {memory:.0f} MiB"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, nargs="+", default=[128, 512])
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--ways", nargs="+", default=["plain", "instead", "beside", "norms", "loop", "vmap"])
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    for hidden in options.hidden:
        ways = Ways(build(hidden))
        functions = {name: getattr(ways, name) for name in options.ways}
        memory = {name: peak_memory(function) for name, function in functions.items()}
        pairs: dict[str, list[tuple[float, float]]] = {name: [] for name in functions}
        for _ in range(options.rounds):
            for name in random.sample(list(functions), len(functions)):
                first = random.random() < 0.5
                before = seconds(ways.plain)[0] if first else 0.0
                taken = seconds(functions[name])[0]
                pairs[name].append((taken, before if first else seconds(ways.plain)[0]))
        sizes = f"{NUM_SEQUENCES} x {ways.buffer.shape[1]} numbers, {ways.buffer.nbytes / 2**20:.0f} MiB of rows"
        print(f"hidden {hidden}: {sizes}; {options.rounds} rounds; {torch.get_num_threads()} thread(s)")
        for name in functions:
            report(name, pairs[name], memory[name])


if __name__ == "__main__":
    main()
