"""What a step did to the log-probabilities of its own completions, by the sign of their advantage."""

import torch
from jaxtyping import Float
from torch import Tensor


def outcome_sums(
    changes: Float[Tensor, " B"], num_tokens: Float[Tensor, " B"], advantages: Float[Tensor, " B"]
) -> Float[Tensor, "3 2"]:
    """
    Numerators and denominators, which add over processes, of: the mean change of a token's log-probability where the
    advantage is above 0, where it is below 0, and the share of completions above 0 that became less likely.

    Args:
        changes: of each completion's log-probability, the sum over its tokens, nats.
    """
    changes, num_tokens, above = changes.double(), num_tokens.double(), advantages > 0
    sums = torch.stack([changes, num_tokens], dim=1)
    fell = torch.stack([changes < 0, torch.ones_like(above)], dim=1).double()
    return torch.stack([sums[above].sum(0), sums[advantages < 0].sum(0), fell[above].sum(0)])
