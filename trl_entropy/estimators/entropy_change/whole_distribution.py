"""What published formulas need of each token's whole distribution, from scores at two temperatures."""

from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor


class DistributionSums(NamedTuple):
    """
    Sums over the V entries of each token's next-token distribution p, with H its entropy.

    `sum_squared` is sum_a p_a^2; `mean_discriminator` is E[S] = sum_a p_a S_a with S_a = p_a (H + log p_a), nats.
    """

    sum_squared: Float[Tensor, "B T"]
    mean_discriminator: Float[Tensor, "B T"]


def distribution_sums(
    logps: Float[Tensor, "B T"],
    entropy: Float[Tensor, "B T"],
    logps_at_half: Float[Tensor, "B T"],
    entropy_at_half: Float[Tensor, "B T"],
) -> DistributionSums:
    """
    The sums over the distributions at the sampling temperature, from the log-probability of the token drawn and the
    entropy there and at half that temperature; all in nats. No logits are needed.

    Half the temperature makes q_a = p_a^2 / C with C = sum_a p_a^2. Of the token drawn, log q = 2 log p - log C, which
    gives C; and the entropy of q is log C - 2/C sum_a p_a^2 log p_a, which gives sum_a p_a^2 log p_a and with it
    E[S] = H C + sum_a p_a^2 log p_a. Exact; float64 from the given scores, whose rounding it keeps. S and its mean:
    arXiv:2602.03392.
    """
    log_c = 2 * logps.double() - logps_at_half.double()
    c = log_c.exp()
    return DistributionSums(c, c * (entropy.double() + (log_c - entropy_at_half.double()) / 2))
