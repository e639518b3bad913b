"""pass@k from n samples per prompt, and bootstrap intervals over prompts."""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

_RESAMPLES_AT_ONCE = 256


def pass_at_k(num_correct: Int[Tensor, "P"], num_samples: int, k: int) -> Float[Tensor, "P"]:
    """Per prompt, the probability that k samples drawn without replacement from its n contain a correct one.

    pass@k = 1 - C(n - c, k) / C(n, k) with c correct among n samples; in float64, as a product of k factors. For
    independent samples it is unbiased for 1 - (1 - p)^k, p the probability that a sample is correct. Taking the first
    k of the n samples would be unbiased too, with a larger variance.

    Args:
        num_correct: c of each prompt.
        num_samples: n, the same for all prompts.
        k: 1 to n.

    Raises:
        ValueError: for k outside 1 to n, or c outside 0 to n.

    Source: Chen et al. 2021, Evaluating Large Language Models Trained on Code, eq. (1).
    """
    if not 1 <= k <= num_samples:
        raise ValueError(f"pass@k needs 1 <= k <= number of samples, got k={k} of {num_samples} samples")
    if ((num_correct < 0) | (num_correct > num_samples)).any():
        raise ValueError(f"num_correct must lie in 0 to {num_samples}, got {num_correct.tolist()[:8]}")
    num_wrong = num_samples - num_correct.double()
    # C(n-c, k) / C(n, k) = prod_j (n - c - j) / (n - j); a factor is zero when fewer than k samples are wrong
    factors = [(num_wrong - j).clamp(min=0) / (num_samples - j) for j in range(k)]
    return 1 - torch.stack(factors).prod(0)


def powers_of_two_up_to(num_samples: int) -> list[int]:
    """1, 2, 4, 8, ... up to the number of samples."""
    return [2**exponent for exponent in range(int(math.log2(num_samples)) + 1)]


def bootstrap_intervals(
    numerators: Float[Tensor, "P K"],
    denominators: Float[Tensor, "P K"],
    confidence: float = 0.95,
    num_resamples: int = 2000,
    seed: int = 0,
) -> Float[Tensor, "K 2"]:
    """Percentile intervals of K ratios sum(numerator) / sum(denominator), by resampling whole prompts.

    Args:
        numerators: a value for each prompt, or its sum over the prompt's tokens or samples.
        denominators: the prompt's number of tokens or samples; with ones the ratio is a mean over prompts.
        confidence: of the intervals.
        num_resamples: bootstrap samples.
        seed: the same seed draws the same prompts, so that intervals of checkpoints are paired.

    Returns:
        Both ends of each interval; nan for fewer than two prompts. The error of the coverage is O(1/sqrt(P)); where
        all prompts agree the interval has no width, however few they are. Resamples whose denominator is 0 are left
        out.

    Source: Efron and Tibshirani 1993, An Introduction to the Bootstrap, chapter 13. Cost: num_resamples P K.
    """
    num_prompts = len(numerators)
    if num_prompts < 2:
        return torch.full((numerators.shape[1], 2), math.nan, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    ratios = []
    for start in range(0, num_resamples, _RESAMPLES_AT_ONCE):
        shape = (min(_RESAMPLES_AT_ONCE, num_resamples - start), num_prompts)
        drawn = torch.randint(num_prompts, shape, generator=generator)
        times_drawn = torch.zeros(shape, dtype=torch.float64).scatter_add_(1, drawn, torch.ones(shape).double())
        ratios.append((times_drawn @ numerators.double()) / (times_drawn @ denominators.double()))
    tail = (1 - confidence) / 2
    ends = torch.tensor([tail, 1 - tail], dtype=torch.float64)
    return torch.nanquantile(torch.cat(ratios), ends, dim=0).T
