"""pass@k from n samples per prompt."""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor


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
