"""The gradient noise scale: how much of a batch gradient is signal, and at which number of prompts that changes.

The independent unit is the prompt group, since its completions share a prompt and their advantages sum to zero. Rows
Y_n are P times group n's share of the loss gradient before clipping, so that g = mean_n Y_n. Groups with zero gradient
count in P too. If groups were resampled, the noise is that of the accepted distribution, and groups that were kept
only because the bound on rounds was reached must be left out (`accepted_products`).

|x|^2 and x . y below may also be those of the optimizer's metric, x' M x and x' M y with M from *before* the step
(T16); the functions are the same. With this step's own gradient in M, M depends on the sample and nothing is unbiased.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from trl_entropy.estimators.statistics.estimate import Estimate
from trl_entropy.estimators.statistics.pooled import PooledParts, StepParts, jackknife_covariance, means_without_one
from trl_entropy.estimators.statistics.u_statistic import (
    row_means_from_products,
)

_BLOCK = 2**14  # columns of rows that are summed in their own dtype


class NoiseParts(NamedTuple):
    """(T14)-(T16): |G|^2, the squared norm of the expected gradient, and tr(Sigma), the variance of one group's Y_n.

    Each is unbiased and may be negative. `variance_trace / grad_sq_norm` is the noise scale in prompts. As a ratio of
    one step's parts it is biased and very noisy, so that parts should be pooled first (`NoiseScaleRecord`).
    """

    grad_sq_norm: float
    variance_trace: float


class GroupProducts(NamedTuple):
    """(T14), (T16): |Y_n|^2 and Y_n . g of every group, plain or in the metric, which give the parts; float64."""

    sq_norms: Float[Tensor, "P"]
    dot_batch: Float[Tensor, "P"]


def group_products(
    rows: Float[Tensor, "P D"],
    batch_gradient: Float[Tensor, "D"],
    preconditioners: Sequence[Float[Tensor, "D"] | None] = (None,),
) -> list[GroupProducts]:
    """(T14), (T16): |Y_n|^2 and Y_n . g of rows Y_n for each diagonal M, None for 1. Cost O(P D); rows are read once.

    Blocks of columns are summed in the rows' dtype, and the blocks in float64: within 1e-6 of float64 for float32
    rows.
    """
    products = [GroupProducts(*rows.new_zeros(2, len(rows), dtype=torch.float64)) for _ in preconditioners]
    for start in range(0, rows.shape[1], _BLOCK):
        block = slice(start, start + _BLOCK)
        part, gradient = rows[:, block], batch_gradient[block].to(rows.dtype)
        squares = part.square()
        for (sq_norms, dot_batch), metric in zip(products, preconditioners, strict=True):
            weights = None if metric is None else metric[block].to(rows.dtype)
            sq_norms += squares.sum(1) if weights is None else squares @ weights
            dot_batch += part @ (gradient if weights is None else weights * gradient)
    return products


def accepted_products(products: GroupProducts, accepted: Bool[Tensor, "P"]) -> GroupProducts:
    """(T14a): the products of the N accepted groups alone, of P; the others have no gradient.

    Their mean Y_n is P/N times the step's gradient. Given N the accepted groups are independent, so that (T14) of
    these products is unbiased for |G|^2 and tr(Sigma) of accepted groups; N < 2: nan. With the other groups left in it
    would be biased, since their number depends on the rest.
    """
    num_accepted = int(accepted.sum())
    sq_norms, dot_batch = (values[accepted] for values in products)
    return GroupProducts(sq_norms, dot_batch * (len(accepted) / num_accepted if num_accepted > 1 else math.nan))


def noise_parts_two_sizes(
    small_sq_norms: Float[Tensor, "K"], big_sq_norm: float, small_size: int, big_size: int
) -> NoiseParts:
    """(T15): the parts from K batches of b = `small_size` prompts and one of B = `big_size`.

    |G|^2 = (B |g_B|^2 - b mean|g_b|^2)/(B - b); tr(Sigma) = (mean|g_b|^2 - |g_B|^2)/(1/b - 1/B). Both sizes count
    prompts; no group may be split. The small batches may be parts of the big one, as micro-batches are, since this
    does not change expectations. Unbiased, with a variance that grows with b. B = b: nan (0/0) or inf. Source:
    arXiv:1812.06162, A.1.
    """
    small_sq_norm = small_sq_norms.double().mean()
    difference = torch.tensor(big_size - small_size, dtype=torch.float64)
    grad_sq_norm = (big_size * big_sq_norm - small_size * small_sq_norm) / difference
    return NoiseParts(float(grad_sq_norm), float(big_size * small_size * (small_sq_norm - big_sq_norm) / difference))


def micro_batch_parts(
    sq_norms: Float[Tensor, "K"], batch_sq_norm: float, num_prompts: int, previous: NoiseParts | None = None
) -> tuple[NoiseParts, PooledParts]:
    """(T15): a step's parts from its K micro-batches of whole groups, and the sums that the step adds to the pool.

    Norms alone give no error within a step. The error comes from the scatter over steps instead: half the outer
    product of the change since the `previous` step's parts, with 2/3 degrees of freedom, as neighbouring changes share
    a step; the square of that has 3 times the expected square, as one change alone is behind it. It is conservative
    while the true parts drift. Nothing is added without a previous step, or if K = 1 (nan).

    Args:
        sq_norms: squared norms of the K micro-batches' mean gradients.
        batch_sq_norm: |g|^2 of the mean of these gradients.
        num_prompts: P of the step; all micro-batches have the same size.
        previous: the parts of the previous step.
    """
    parts = noise_parts_two_sizes(sq_norms, batch_sq_norm, num_prompts // len(sq_norms), num_prompts)
    if previous is None or not all(map(math.isfinite, (*parts, *previous))):
        return parts, PooledParts.empty(2)
    values = torch.tensor(parts, dtype=torch.float64)
    change = values - torch.tensor(previous, dtype=torch.float64)
    step = StepParts(values, change.outer(change) / 2, num_prompts)
    return parts, PooledParts.of_step(step, dof=2 / 3, square_bias=3.0)


def jackknifed_parts(
    group_sq_norms: Float[Tensor, "P"],
    group_dot_batch: Float[Tensor, "P"],
    half_products: Float[Tensor, "P"] | None = None,
) -> StepParts:
    """(T14): |G|^2, tr(Sigma) and, from `half_products`, the between-prompt trace, with their jackknife covariance.

    `group_dot_batch` are Y_n . g, whose mean is |g|^2. They give |g_-n|^2 without products of pairs of groups: |G|^2
    is the U-statistic of (T17) with X = Y, so that |G|^2_-n = (P |G|^2 - 2 r_n)/(P - 2). `half_products` are Y_a . Y_b
    from `half_advantages`. P < 3: the covariance is nan. The jackknife overstates the variance of |G|^2; an unbiased
    estimate would need all products of pairs (T17).
    """
    sq_norms = group_sq_norms.double()
    num_prompts = len(sq_norms)
    rows = row_means_from_products(sq_norms, group_dot_batch, group_dot_batch)
    signal = rows.mean()
    others = torch.tensor(num_prompts - 2, dtype=torch.float64, device=rows.device)
    signal_left_out = (num_prompts * signal - 2 * rows) / others
    means = [sq_norms] if half_products is None else [sq_norms, half_products.double()]
    values = torch.stack([signal, *(mean.mean() - signal for mean in means)])
    left_out = torch.stack([signal_left_out, *(means_without_one(mean) - signal_left_out for mean in means)], 1)
    return StepParts(values, jackknife_covariance(left_out), num_prompts)


def half_advantages(rewards: Float[Tensor, "P G"]) -> Float[Tensor, "P G"]:
    """(T14), last line: advantages under which each *half* of a group has the expected gradient of the whole, Y_n.

    (G-1)/H (r_i - mean of r over the others of i's half), with H the size of i's half; the halves are the first G // 2
    completions and the rest. If these replace A_i = r_i - mean r (T1) in the loss, with the same 1/(P G L), each half
    alone gives Y_a or Y_b, and E[Y_a . Y_b | prompt] = |E[Y_n | prompt]|^2, since the halves share only the prompt.
    This is exact for centred, unscaled advantages and a fixed L; with `scale_rewards` or `group_max` both halves would
    enter the scale. ValueError for G < 4, since a half needs two completions.
    """
    num_generations = rewards.shape[1]
    if num_generations < 4:
        raise ValueError(f"a within/between split needs 4 completions a prompt, got {num_generations}")
    halves = rewards.double().split([num_generations // 2, num_generations - num_generations // 2], dim=1)
    # r_i less the mean of the others is H/(H-1) times r_i less the mean of all H.
    advantages = [(half - half.mean(1, keepdim=True)) / (half.shape[1] - 1) for half in halves]
    return (num_generations - 1) * torch.cat(advantages, 1)


@dataclass(frozen=True)
class NoiseScaleRecord:
    """(T14), (T16): the parts of many steps with their errors. Parts are pooled first and divided afterwards.

    The sums can be added over steps and runs. Errors of `jackknifed_parts` are conservative: where noise dominates,
    the variance of |G|^2 is up to 2 (P-1)/(P-2) times too large, and that of tr(Sigma) by about 10 % at P = 8.
    """

    parts: PooledParts

    @classmethod
    def empty(cls, with_halves: bool = False) -> "NoiseScaleRecord":
        """The record of no steps; set `with_halves` if its steps will have `half_products`."""
        return cls(PooledParts.empty(3 if with_halves else 2))

    def update(self, step: StepParts) -> "NoiseScaleRecord":
        """The record with one step added: its parts with their covariance, such as `jackknifed_parts`."""
        return NoiseScaleRecord(self.parts.update(step))

    def merge(self, other: "NoiseScaleRecord") -> "NoiseScaleRecord":
        """The record of both sets of steps."""
        return NoiseScaleRecord(self.parts.merge(other.parts))

    def grad_sq_norm(self) -> Estimate:
        """|G|^2, mean over steps; unbiased. If its interval includes 0, no signal was detected."""
        return self.parts.mean(self._part(0))

    def variance_trace(self) -> Estimate:
        """tr(Sigma), mean over steps; unbiased."""
        return self.parts.mean(self._part(1))

    def noise_scale(self) -> Estimate:
        """tr(Sigma)/|G|^2 in prompts; bias O(1/(steps P)). Use the stderr only while it is small, else `interval`."""
        return self.parts.ratio(self._part(1), self._part(0))

    def signal_to_noise(self, num_prompts: int = 1) -> Estimate:
        """|G|^2 / (tr(Sigma)/P): squared length of the expected gradient over the variance of a mean of P groups."""
        return self.parts.ratio(num_prompts * self._part(0), self._part(1))

    def interval(self, confidence: float = 0.95) -> tuple[float, float]:
        """The confidence interval of the noise scale, in prompts; (lower, inf) where |G|^2 is consistent with 0.

        It is the reciprocal of Fieller's interval of the signal to noise of one prompt, in which negative bounds count
        as 0, since |G|^2 >= 0. (inf, inf): the estimate of |G|^2 is significantly negative.
        """
        low, high = self.parts.ratio_interval(self._part(0), self._part(1), confidence)
        if math.isnan(low):
            return math.nan, math.nan
        return _reciprocal(high), _reciprocal(low)

    def suggested_num_prompts(self, efficiency: float = 0.5, confidence: float = 0.95) -> tuple[float, float]:
        """Batch sizes, in prompts, at which a step makes the share `efficiency` of a noise-free step's progress.

        N e/(1 - e) at both ends of the interval of the noise scale N, since progress is 1/(1 + N/P) (arXiv:1812.06162,
        equation 2.7) for SGD at its best learning rate; with N in the metric of the optimizer (T16) it is a heuristic
        for AdamW. e = 1/2 takes twice the fewest possible steps, and twice the fewest possible completions.
        """
        low, high = self.interval(confidence)
        return low * efficiency / (1 - efficiency), high * efficiency / (1 - efficiency)

    def between_prompt_trace(self) -> Estimate:
        """tr Cov(E[Y_n | prompt]), mean over steps: noise that more completions per prompt do not reduce. Unbiased."""
        return self.parts.mean(self._part(2))

    def within_prompt_trace(self) -> Estimate:
        """E[tr Cov(Y_n | prompt)] = tr(Sigma) less the between-prompt trace; falls about as 1/G. Unbiased."""
        return self.parts.mean(self._part(1) - self._part(2))

    def between_prompt_share(self) -> Estimate:
        """The between-prompt trace over tr(Sigma); bias O(1/(steps P))."""
        return self.parts.ratio(self._part(2), self._part(1))

    def _part(self, index: int) -> Float[Tensor, "K"]:
        num_parts = len(self.parts.values)
        if index >= num_parts:
            raise ValueError("this record has no half_products: start it with empty(with_halves=True)")
        return torch.eye(num_parts, dtype=torch.float64)[index]


def _reciprocal(bound: float) -> float:
    return 1 / bound if bound > 0 else math.inf
