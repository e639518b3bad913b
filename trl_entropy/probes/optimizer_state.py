"""Percentiles of the optimizer's moments, and how many coordinates have a second moment of (nearly) 0."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
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
            counts = _counts(engine.moments(moment), args.adam_epsilon**2).cpu()  # the only time that the host waits
            for percent in _PERCENTS:
                metrics[f"optimizer_state/{moment}_p{percent}"] = magnitude_quantile(counts[2:], percent / 100)
            if moment == "exp_avg_sq":
                num_zero, num_below = counts[:2].tolist()
                metrics["optimizer_state/exp_avg_sq_num_zero"] = num_zero
                metrics["optimizer_state/exp_avg_sq_num_below_eps_sq"] = num_below


def _counts(moments: Mapping[str, Float[Tensor, "..."]], tiny: float) -> Int[Tensor, " two_more"]:
    """How many numbers are 0, how many below `tiny`, and how many in each bin; with one tensor at a time."""
    of_each = (_counts_of(moments[name], tiny) for name in moments)
    return functools.reduce(torch.add, of_each)


def _counts_of(moment: Float[Tensor, "..."], tiny: float) -> Int[Tensor, " two_more"]:
    return torch.cat([torch.stack([(moment == 0).sum(), (moment < tiny).sum()]), magnitude_counts([moment])])
