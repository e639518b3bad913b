"""The turns of an episode, from the mask of the tokens that the policy drew."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def turn_index(loss_mask: Bool[Tensor, "B T"] | Int[Tensor, "B T"], most: int) -> Int[Tensor, "B T"]:
    """
    The turn of each token that the policy drew: 0 for the first, one more after each run of tokens of an environment.

    Args:
        loss_mask: 1 for tokens that the policy drew, 0 for those of tools and environments and for padding, on the
            right.
        most: the largest index; later turns have it too.

    Returns:
        0 under the mask, and for tokens of tools that come before the first turn.
    """
    own = loss_mask.long()
    begins = (own - torch.nn.functional.pad(own, (1, 0))[:, :-1]).clamp(min=0)
    return ((begins.cumsum(1) - 1).clamp(0, most)) * own


def sums_by_category(
    values: Float[Tensor, "B T"],
    categories: Int[Tensor, "B T"],
    loss_mask: Bool[Tensor, "B T"] | Int[Tensor, "B T"],
    num_categories: int,
) -> Float[Tensor, "2 C"]:
    """The sum of the values of each category's tokens, and the number of these; both add over ranks and batches."""
    mask = loss_mask.bool()
    zeros = torch.zeros(2, num_categories, dtype=torch.float64, device=values.device)
    given = torch.stack([values.double()[mask], torch.ones_like(values.double()[mask])])
    return zeros.index_add(1, categories[mask], given)
