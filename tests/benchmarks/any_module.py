"""
What the general way of per-sequence gradients costs against a rule: squared norms of a full fine-tuning step of one
model, by the rules of its layers and with every layer differentiated alone, interleaved.

    python tests/benchmarks/any_module.py
"""

import contextlib
import statistics
import time
from unittest import mock

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from trl_entropy.gradients import layer_rules, module_vjp, sequence_gradients
from trl_entropy.gradients.sequence_gradients import SequenceGradients, SquaredNorms

ROWS, LENGTH, REPEATS = 8, 64, 7


def build():
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4, "vocab_size": 512}
    return Qwen2ForCausalLM(Qwen2Config(**sizes, num_attention_heads=4, num_key_value_heads=2))


def seconds(model, ids, with_rows):
    norms = SquaredNorms(ROWS)
    start = time.perf_counter()
    if with_rows:
        with SequenceGradients(model, norms, weight_gradients=False) as collector:
            loss = model(input_ids=ids, use_cache=False).logits.logsumexp(-1).sum()
            with collector.batch(torch.arange(ROWS)):
                loss.backward()
    else:
        model(input_ids=ids, use_cache=False).logits.logsumexp(-1).sum().backward()
        model.zero_grad()
    return time.perf_counter() - start, norms.values if with_rows else None


def none(layer, call):
    return None


def main():
    model, ids = build(), torch.randint(512, (ROWS, LENGTH))
    times = {way: [] for way in ("plain", "rules", "batched", "one by one")}
    for repeat in range(REPEATS + 1):
        values = {}
        for way, spent in times.items():
            module_vjp._WAY.clear()
            module_vjp._WAY.update(dict.fromkeys(model.modules(), int(way == "one by one")))
            with contextlib.ExitStack() as without_rules:
                if way in ("batched", "one by one"):
                    without_rules.enter_context(mock.patch.object(sequence_gradients, "behaviour_of", none))
                    without_rules.enter_context(mock.patch.object(layer_rules, "_RULES", {}))
                took, values[way] = seconds(model, ids, way != "plain")
            if repeat:  # the first warms up
                spent.append(took)
        torch.testing.assert_close(values["batched"], values["rules"], rtol=1e-4, atol=0)
    rules = times["rules"]
    for way, spent in times.items():
        ratios = sorted(a / b for a, b in zip(spent, rules, strict=True))
        print(f"{way:<12} {statistics.median(ratios):.2f} of the rules' time ({ratios[0]:.2f} to {ratios[-1]:.2f})")


if __name__ == "__main__":
    main()
