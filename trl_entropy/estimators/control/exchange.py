"""What a step pays in reward for the entropy that it keeps: the changes of both, under several update rules (T20).

Expectations over the completions that make a step are means over redraws of them; grad h and grad J are sums over K
blocks of other completions. All rules share both, so that their differences have smaller errors than they themselves.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from trl_entropy.estimators.statistics.estimate import Estimate
from trl_entropy.estimators.statistics.importance import importance_weights
from trl_entropy.estimators.statistics.pooled import PooledParts, StepParts


def leave_one_out_advantages(rewards: Float[Tensor, "P G"]) -> Float[Tensor, "P G"]:
    """r_i less the mean reward of the others in its group; E[A grad log pi(o)] is then grad J without bias. G > 1."""
    group_size = rewards.shape[1]
    return group_size / (group_size - 1) * (rewards.double() - rewards.double().mean(1, keepdim=True))


def reward_change_terms(
    per_token_logps: Float[Tensor, "B T"],
    sampling_logps: Float[Tensor, "B T"],
    advantages: Float[Tensor, "B"],
    loss_mask: Bool[Tensor, "B T"] | Int[Tensor, "B T"],
) -> Float[Tensor, "B"]:
    """(T20): (w_i - 1) A_i with the sequence weights of (T6); its expectation is J(theta + dtheta) - J(theta).

    With the `advantages` of [`leave_one_out_advantages`] it is unbiased, as E[w - 1] = 0 given the prompt. Its
    derivative along the step is A_i times that of log pi(o_i), so that first order and true change are paired.
    """
    weights = importance_weights(per_token_logps, sampling_logps, loss_mask, "sequence")[:, 0]
    return (weights - 1) * advantages.double()


class BlockRatio(NamedTuple):
    """N ratios of sums over K blocks, and K times the first-order change of each if a block gets 1/K more weight."""

    values: Float[Tensor, "N"]
    influence: Float[Tensor, "K N"]


def ratio_over_blocks(numerators: Float[Tensor, "K N"], sizes: Float[Tensor, "K N"]) -> BlockRatio:
    """(T20): sum of numerators over sum of sizes, and its influence.

    For the entropy the numerator is the gradient of a block's `surrogate_terms` times the step, and the size its
    number of tokens; h in these terms is that of all blocks, whose own error is neglected as in (T8b). For the reward
    the numerator is the gradient of sum_i A_i log pi(o_i) times the step, and the size the number of completions.
    """
    mean_sizes = sizes.double().mean(0)
    values = numerators.double().mean(0) / mean_sizes
    return BlockRatio(values, (numerators.double() - values * sizes.double()) / mean_sizes)


def mean_over_redraws(
    redraws: Float[Tensor, "R N"], influence: Float[Tensor, "K N"], corrections: Float[Tensor, "S N"] | None = None
) -> StepParts:
    """
    Means of N changes over redraws, with the covariance of their errors from the redraws and from the K blocks.

    The two covariances are added; where both are mostly noise their product is counted twice (T18), so that intervals
    are slightly too wide. The degrees of freedom are those of the smallest of the numbers.

    Args:
        redraws: the change of each redraw; redraws are independent.
        influence: influence of the blocks on the means, corrections included.
        corrections: true change less first order for the first S redraws; their mean is added.
    """
    num_redraws, num_blocks = len(redraws), len(influence)
    redraws, influence = redraws.double(), influence.double()
    of_blocks = influence.T @ influence / (num_blocks * (num_blocks - 1))
    if corrections is None:
        return StepParts(redraws.mean(0), of_blocks + torch.cov(redraws.T) / num_redraws, min(num_redraws, num_blocks))
    num_corrected, corrections = len(corrections), corrections.double()
    # f_bar + c_bar = mean_S [S/R f + c] + (R - S)/R mean_rest f, of independent redraws
    both = num_corrected / num_redraws * redraws[:num_corrected] + corrections
    others = (num_redraws - num_corrected) / num_redraws**2
    of_redraws = torch.cov(both.T) / num_corrected + others * torch.cov(redraws.T)
    dof_number = min(num_corrected, num_blocks)
    return StepParts(redraws.mean(0) + corrections.mean(0), of_blocks + of_redraws, dof_number)


@dataclass(frozen=True)
class ExchangeRecord:
    """
    Mean entropy change (nats per token and step) and reward change (reward per step) of M methods.

    Args:
        methods: their names; the others are compared with the first.
        parts: the entropy change of each method, then the reward change of each.
    """

    methods: tuple[str, ...]
    parts: PooledParts

    @classmethod
    def of(cls, methods: Sequence[str], parts: StepParts) -> "ExchangeRecord":
        """The record from [`mean_over_redraws`] of 2 M columns."""
        return cls(tuple(methods), PooledParts.empty(2 * len(methods)).update(parts))

    def change(self, quantity: str, method: str) -> Estimate:
        """The change of the `"entropy"` or the `"reward"` by a method's step."""
        return self.parts.mean(self._weights(quantity, method))

    def difference(self, quantity: str, method: str) -> Estimate:
        """The paired difference of that change from the change by the first method."""
        return self.parts.mean(self._difference(quantity, method))

    def reward_per_entropy(self, method: str) -> dict[str, float]:
        """(T20): reward change over entropy change of the method's step, per nat/token, with Fieller's interval."""
        return self._ratio(*(self._weights(quantity, method) for quantity in ("reward", "entropy")))

    def exchange(self, method: str) -> dict[str, float]:
        """(T20): the same ratio of the differences from the first method, per nat/token, with Fieller's interval."""
        return self._ratio(*(self._difference(quantity, method) for quantity in ("reward", "entropy")))

    def _ratio(self, numerator: Float[Tensor, "K"], denominator: Float[Tensor, "K"]) -> dict[str, float]:
        ratio = self.parts.ratio(numerator, denominator)
        low, high = self.parts.ratio_interval(numerator, denominator)
        return {"value": ratio.value, "stderr": ratio.stderr, "low": low, "high": high}

    def _weights(self, quantity: str, method: str) -> Float[Tensor, "K"]:
        weights = torch.zeros(2 * len(self.methods), dtype=torch.float64)
        weights[("entropy", "reward").index(quantity) * len(self.methods) + self.methods.index(method)] = 1.0
        return weights

    def _difference(self, quantity: str, method: str) -> Float[Tensor, "K"]:
        return self._weights(quantity, method) - self._weights(quantity, self.methods[0])
