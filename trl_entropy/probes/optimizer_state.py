"""Percentiles of the optimizer's moments, and how many coordinates have a second moment of (nearly) 0."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from trl_entropy.estimators.optimizer.magnitude import magnitude_counts, magnitude_quantile
from trl_entropy.probes.probe import Probe

_PERCENTS = (1, 10, 50, 90, 99)


class OptimizerStateProbe(Probe):
    """
    Logs percentiles of Adam's moments |exp_avg| and exp_avg_sq after the step, and the number of coordinates in which
    exp_avg_sq is 0, and in which sqrt(exp_avg_sq) is below the optimizer's eps.
    """

    name = "optimizer_state"

    def on_after_update(self, args, state, control, *, metrics, engine, **kwargs: Any) -> None:
        for moment in ("exp_avg", "exp_avg_sq"):
            tensors = list(engine.moments(moment).values())
            counts = magnitude_counts(tensors)
            for percent in _PERCENTS:
                metrics[f"optimizer_state/{moment}_p{percent}"] = magnitude_quantile(counts, percent / 100)
            if moment == "exp_avg_sq":
                metrics["optimizer_state/exp_avg_sq_num_zero"] = _count(tensors, lambda v: v == 0)
                metrics["optimizer_state/exp_avg_sq_num_below_eps_sq"] = _count(
                    tensors, lambda v: v < args.adam_epsilon**2
                )


def _count(tensors: list[Tensor], condition) -> int:
    return sum(int(condition(tensor).sum()) for tensor in tensors)
