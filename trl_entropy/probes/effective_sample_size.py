"""How many equally weighted completions a step is worth: the effective sample size of its weights."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from jaxtyping import Float
from torch import Tensor

from trl_entropy.estimators.statistics.importance import effective_sample_size_from_sums, loss_weights
from trl_entropy.probes.probe import Probe
from trl_entropy.rollouts.batch import RolloutBatch


class EffectiveSampleSizeProbe(Probe):
    """
    Logs the effective sample size (T3), in completions, of two kinds of weights: the loss weights 1/(G L_i) of
    completions whose advantage is not 0, and the importance ratios of whole completions.
    """

    name = "effective_sample_size"

    def __init__(self, every: int = 1) -> None:
        super().__init__(every)
        self._ratios: list[Tensor] = []

    def reset(self) -> None:
        self._ratios.clear()

    def on_micro_batch(self, args, state, control, *, metrics, log_ratio: Tensor | None, mask, **kwargs: Any) -> None:
        sums = torch.zeros(len(mask)) if log_ratio is None else (log_ratio.double() * mask).sum(dim=1)
        self._ratios.append(sums.exp().to(mask.device))

    def on_rollouts(
        self, args, state, control, *, metrics, rollouts: RolloutBatch, accelerator: Accelerator, **kwargs: Any
    ) -> None:
        normalizers = args.max_completion_length / rollouts.length_scale
        weights = loss_weights(normalizers, rollouts.raw_advantages, args.num_generations)
        metrics["ess/loss_weights"] = _global_sample_size(weights, accelerator)
        metrics["ess/importance_weights"] = _global_sample_size(torch.cat(self._ratios), accelerator)
        metrics["ess/num_completions"] = accelerator.reduce((weights != 0).sum(), reduction="sum").item()
        self._ratios.clear()


def _global_sample_size(weights: Float[Tensor, " B"], accelerator: Accelerator) -> float:
    weights = weights.double()
    weight_sum, weight_sq_sum = accelerator.reduce(torch.stack([weights.sum(), weights.square().sum()]))
    return effective_sample_size_from_sums(weight_sum, weight_sq_sum).item()
