"""The step rule (T5) of bitsandbytes' 8-bit AdamW, whose moments are read from their quantised blocks."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from trl_entropy.estimators.optimizer.adamw import UpdateParts, adamw_update_parts
from trl_entropy.estimators.optimizer.rules import AdamWRule, settings_of
from trl_entropy.estimators.optimizer.step_rule import Group, State

_BLOCK = 256  # numbers that share one scale


class QuantisedAdamWRule(AdamWRule):
    """
    bitsandbytes' `AdamW` with `optim_bits=8`: a moment is a code of 8 bits a number, a table of what the codes stand
    for, and a scale for each block of 256; small parameters and embeddings have whole moments under the same names.

    A step is AdamW's (T4) from the moments as they are stored, before the new ones are rounded, so that the parts sum
    to it as exactly as AdamW's do. Weight decay is taken off after the step, a difference of lr times wd of the step.
    """

    keys = ("state1", "qmap1", "absmax1", "state2", "qmap2", "absmax2")
    metric_keys = ("state2", "qmap2", "absmax2")

    def why_not(self, group: Group) -> str:
        return ""

    def advanced(self, state: State, clipped: Tensor, param: Tensor, step: int, group: Group) -> State:
        return super().advanced(_moments(state, clipped), clipped, param, step, group)

    def metric(self, state: State, like: Tensor, step: int, group: Group) -> Tensor:
        return super().metric(_moments(state, like), like, step, group)

    def momentum(self, state: State, metric: Tensor, step: int, group: Group) -> Tensor:
        return super().momentum(_moments(state, metric), metric, step, group)

    def parts(
        self, state: State, gradient: Tensor, param: Tensor, step: int, group: Group, clip_factor: float = 1.0
    ) -> UpdateParts:
        zero, moments = torch.zeros_like(gradient), _moments(state, gradient)
        exp_avg, exp_avg_sq = (moments.get(key, zero) for key in ("exp_avg", "exp_avg_sq"))
        return adamw_update_parts(param, gradient, exp_avg, exp_avg_sq, step, settings_of(group), clip_factor)


def _moments(state: State, like: Float[Tensor, "*shape"]) -> State:
    """Both moments as AdamW names them, as far as the state has them; as they are where they are whole already."""
    found = {key: state[key] for key in ("exp_avg", "exp_avg_sq") if key in state}
    for number, key in ((1, "exp_avg"), (2, "exp_avg_sq")):
        if f"state{number}" in state:
            found[key] = _dequantised(state, number, like)
    return found


def _dequantised(state: State, number: int, like: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    codes = state[f"state{number}"]
    if f"qmap{number}" not in state:
        return codes.to(like.dtype).reshape(like.shape)
    table, scales = state[f"qmap{number}"].to(like.dtype), state[f"absmax{number}"].to(like.dtype)
    return (table[codes.flatten().long()] * scales.repeat_interleave(_BLOCK)[: codes.numel()]).reshape(like.shape)
