"""
Which generation mode of transformers draws the completions of `trl-entropy evaluate` fastest on this device?

    python tests/benchmarks/generate_modes.py [--model FOLDER] [--problems 32] [--samples 8] [--rounds 5]

The modes take turns on the same held-out prompts, sorted by length as in the evaluation. Tokens per second count the
tokens up to the end of each completion; `greedy` says how many greedy completions equal those of the first mode.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from trl_entropy.evaluation.sampling import end_token_ids, first_end
from trl_entropy.models.warm_start import warm_start
from trl_entropy.runs.console import quiet_libraries
from trl_entropy.tasks.word_problems import load_word_problems

Draw = Callable[[list[list[int]], GenerationConfig], list[list[int]]]


def padded(model, tokenizer, batch_size: int, cache: str | None) -> Draw:
    """`generate` on left-padded batches."""

    def draw(prompts: list[list[int]], how: GenerationConfig) -> list[list[int]]:
        how = GenerationConfig(**{**how.to_diff_dict(), "cache_implementation": cache})
        drawn = []
        for start in range(0, len(prompts), batch_size):
            rows = prompts[start : start + batch_size]
            width = max(map(len, rows))
            ids = torch.tensor([[how.pad_token_id] * (width - len(row)) + row for row in rows], device=model.device)
            mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=model.device)
            drawn += model.generate(input_ids=ids, attention_mask=mask, generation_config=how)[:, width:].tolist()
        return drawn

    return draw


def continuous(model) -> Draw:
    """`generate_batch`: without padding, with a paged cache; the next prompt replaces a finished completion."""

    def draw(prompts: list[list[int]], how: GenerationConfig) -> list[list[int]]:
        outputs = model.generate_batch(prompts, generation_config=how, progress_bar=False)
        by_number = sorted(outputs.items(), key=lambda item: int(item[0].split("_")[-1]))
        return [output.generated_tokens for _, output in by_number]

    return draw


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", help="folder of a model (default: the embedded model after its warm start)")
    parser.add_argument("--problems", type=int, default=32)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--max-new-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[32, 256])
    parser.add_argument("--without", nargs="*", default=[], help="modes to leave out")
    args = parser.parse_args()
    quiet_libraries()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    name = args.model or str(warm_start(seed=0))
    tokenizer = AutoTokenizer.from_pretrained(name)
    model = AutoModelForCausalLM.from_pretrained(name, dtype=getattr(torch, args.dtype)).to(device).eval()
    texts = [row["prompt"] for row in load_word_problems("test", args.problems)]
    prompts = sorted(
        (ids for ids in tokenizer(texts)["input_ids"] for _ in range(args.samples)), key=len, reverse=True
    )
    ends = end_token_ids(model, tokenizer)
    how = GenerationConfig(
        max_new_tokens=args.max_new_tokens, do_sample=True, top_k=0, pad_token_id=tokenizer.pad_token_id,
        eos_token_id=sorted(ends),
    )  # fmt: skip
    modes: dict[str, Draw] = {}
    for size in args.batch_sizes:
        modes[f"dynamic, batch {size}"] = padded(model, tokenizer, size, None)
        modes[f"static, batch {size}"] = padded(model, tokenizer, size, "static")
    modes["continuous"] = continuous(model)
    modes = {mode: draw for mode, draw in modes.items() if mode not in args.without}
    report(modes, prompts, how, ends, args.rounds, device)


def report(
    modes: dict[str, Draw], prompts: list[list[int]], how: GenerationConfig, ends: set[int], rounds: int, device: str
) -> None:
    rates: dict[str, list[float]] = {mode: [] for mode in modes}
    greedy = {}
    some = prompts[:: max(1, len(prompts) // 16)]
    for mode, draw in modes.items():
        how.do_sample = False
        greedy[mode] = [first_end(list(ids), ends)[0] for ids in draw(some, how)]
    how.do_sample = True
    for number in range(rounds):
        for mode, draw in modes.items():
            torch.manual_seed(number)
            start = time.perf_counter()
            with torch.no_grad():
                drawn = draw(prompts, how)
            seconds = time.perf_counter() - start
            rates[mode].append(sum(len(first_end(list(ids), ends)[0]) for ids in drawn) / seconds)
    reference = next(iter(modes))
    print(f"{len(prompts)} completions on {device}, {torch.get_num_threads()} thread(s), {rounds} rounds")
    for mode, values in rates.items():
        ratio = [value / first for value, first in zip(values, rates[reference], strict=True)]
        same = sum(a == b for a, b in zip(greedy[mode], greedy[reference], strict=True))
        print(
            f"{mode:<20} {statistics.median(values):8.0f} tokens/s, {statistics.median(ratio):.2f} of {reference} "
            f"({min(ratio):.2f} to {max(ratio):.2f}); greedy {same} of {len(some)} the same"
        )


if __name__ == "__main__":
    main()
