"""
Which form of (T21) scatters least: redraws of the measured change on a tiny policy whose outcomes are enumerated.

    python -m tests.benchmarks.expectation_forms

For rewards that are rare, even and common, and for a short and a long step: scatter over redraws, mean stated error
over scatter, bias over scatter, and how many of the 95 % intervals cover the truth.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tests.estimators.tiny_policy import TinyPolicy
from trl_entropy.estimators.entropy_change.delta_entropy import RatioTerms, delta_measured
from trl_entropy.estimators.entropy_change.expectation import baseline
from trl_entropy.estimators.statistics.calibration import coverage

NUM_PROMPTS, NUM_GENERATIONS, REPEATS = 16, 8, 300
POLICY = TinyPolicy(max_length=4, num_prompts=12, seed=5)


def forms(weights: Tensor, values: Tensor, prompts: Tensor) -> dict[str, tuple[RatioTerms, RatioTerms]]:
    """Terms before and after the step; the policy after it drew the completions, `weights` are those of before."""
    ones = torch.ones_like(weights)
    levels = {
        "no baseline": torch.zeros_like(values),
        "mean of the prompt's others": baseline(values, prompts),
        "mean of all others": (values.sum() - values) / (len(values) - 1),
    }
    found = {
        name: (RatioTerms(weights * (values - level), ones), RatioTerms(values - level, ones))
        for name, level in levels.items()
    }
    return found | {"self-normalised": (RatioTerms(weights * values, weights), RatioTerms(values, ones))}


def main() -> None:
    rows, groups = (torch.Generator().manual_seed(seed) for seed in (1, 2))
    score = torch.randn(len(POLICY.token_ids), generator=rows, dtype=torch.float64)
    score = score + 1.5 * torch.randn(12, generator=groups, dtype=torch.float64)[POLICY.prompt_index]
    print("| reward | step | form | scatter | stated / scatter | bias / scatter | covered |\n" + "|---" * 7 + "|")
    for rate in (0.1, 0.5, 0.9):
        for length in (0.3, 2.0):
            before, after = (POLICY.probabilities(POLICY.theta + s * length * POLICY.update) for s in (0, 1))
            values = (score > _quantile(score, after, 1 - rate)).double()
            truth, log_weights = float((after - before) @ values), (before / after).log()
            estimates: dict[str, list] = {}
            generator = torch.Generator().manual_seed(0)
            for _ in range(REPEATS):
                drawn = torch.randint(POLICY.num_prompts, (NUM_PROMPTS,), generator=generator)
                of_prompt = after * (POLICY.prompt_index == drawn[:, None])
                rows = torch.multinomial(of_prompt, NUM_GENERATIONS, replacement=True, generator=generator).flatten()
                prompts = torch.arange(NUM_PROMPTS).repeat_interleave(NUM_GENERATIONS)
                for name, terms in forms(log_weights[rows].exp(), values[rows], prompts).items():
                    estimates.setdefault(name, []).append(delta_measured(*terms).estimate(prompts))
            for name, some in estimates.items():
                found = coverage(some, truth)
                print(
                    f"| {rate:.0%} | {truth:+.4f} | {name} | {found.scatter:.5f} | {found.stderr_ratio:.2f} | "
                    f"{found.bias_ratio:+.2f} | {found.covered:.3f} |",
                    flush=True,
                )


def _quantile(score: Tensor, probabilities: Tensor, share: float) -> Tensor:
    order = score.argsort()
    return score[order][int((probabilities[order].cumsum(0) < share).sum())]


if __name__ == "__main__":
    main()
