"""How many tokens a step has sent to other experts of a mixture."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from jaxtyping import Bool, Int
from torch import Tensor


def router_flips(
    before: Int[Tensor, "B T L k"] | None,
    after: Int[Tensor, "B T L k"] | None,
    loss_mask: Bool[Tensor, "B T"],
    accelerator: Accelerator,
) -> dict[str, float]:
    """
    The share of (token, layer) whose set of experts differs between two ends of a step, over all processes; nothing
    for a dense model. Collective for a mixture.

    Args:
        before, after: the sets of the k experts that L routers chose, ascending (`TokenScores.experts`).
        loss_mask: 1 for the tokens that the policy drew; others are not counted.
    """
    if before is None or after is None:
        return {}
    differs = (before != after).any(-1) & loss_mask.unsqueeze(-1)
    counts = torch.stack([differs.sum(), loss_mask.sum() * before.shape[2]]).double()
    changed, number = accelerator.reduce(counts, reduction="sum").tolist()
    return {"entropy/router_flip_share": changed / number} if number else {}
