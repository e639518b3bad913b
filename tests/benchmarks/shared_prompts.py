"""
Time of scoring completions whose prompts are read once, relative to scoring each row by itself, in turns.

    OMP_NUM_THREADS=1 python tests/benchmarks/shared_prompts.py [--rounds 40]

32 completions in 4 groups by the embedded model after its warm start, of random tokens: prompts of 23 to 29,
completions of 8 to 32. CPU seconds of the process, which depend less on other load.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from transformers import AutoModelForCausalLM

from trl_entropy.gradients import shared_prompts
from trl_entropy.gradients.scores import TokenScores, score
from trl_entropy.models.warm_start import warm_start
from trl_entropy.rollouts.completions import Completions

PROMPTS, GROUP, PROMPT, COMPLETION, VOCABULARY = 4, 8, 29, 32, 382


def completions(generator: torch.Generator) -> Completions:
    """Each group's prompt, padded on the left, with completions padded on the right."""
    columns = torch.arange(PROMPT)
    starts = torch.randint(0, 7, (PROMPTS, 1), generator=generator).repeat_interleave(GROUP, 0)
    prompts = torch.randint(5, VOCABULARY, (PROMPTS, PROMPT), generator=generator).repeat_interleave(GROUP, 0)
    lengths = torch.randint(8, COMPLETION + 1, (PROMPTS * GROUP, 1), generator=generator)
    mask, seen = (torch.arange(COMPLETION) < lengths).long(), (columns >= starts).long()
    ids = torch.randint(5, VOCABULARY, mask.shape, generator=generator)
    return Completions(
        torch.cat([prompts * seen, ids * mask], 1),
        torch.cat([seen, mask], 1),
        mask,
        torch.arange(PROMPTS).repeat_interleave(GROUP),
        loss_mask=mask,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40)
    options = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(str(warm_start(seed=0))).eval()
    batch, limit = completions(generator), shared_prompts.MAX_LOGITS
    params = {name: param.detach() for name, param in model.named_parameters()}
    direction = {name: 1e-3 * torch.randn(value.shape, generator=generator) for name, value in params.items()}

    def timed(shared: bool, order: int) -> tuple[TokenScores, float]:
        shared_prompts.MAX_LOGITS, start = limit if shared else 0, time.process_time()
        return score(model, batch, 1.0, 64, params, direction, order), time.process_time() - start

    for order in (0, 1):
        alone, together = timed(False, order)[0], timed(True, order)[0]
        pairs = zip((*alone.entropy, *alone.logps), (*together.entropy, *together.logps), strict=True)
        apart = max(float((a - b).abs().max()) for a, b in pairs)
        times: dict[bool, list[float]] = {False: [], True: []}
        for number in range(options.rounds):
            for shared in (number % 2 == 0, number % 2 == 1):
                times[shared].append(timed(shared, order)[1])
        ratios = [fast / slow for slow, fast in zip(times[False], times[True], strict=True)]
        print(
            f"order {order}: fastest {1e3 * min(times[False]):.1f} ms alone, {1e3 * min(times[True]):.1f} ms shared, "
            f"ratio {min(times[True]) / min(times[False]):.2f}; median of neighbours' ratios "
            f"{statistics.median(ratios):.2f}; numbers apart by {apart:.1e}"
        )


if __name__ == "__main__":
    main()
