"""All claims, in the order of the table."""

from __future__ import annotations

from trl_entropy.experiments.claims import (
    bonus_bias,
    discriminator_sign,
    high_entropy_tokens,
    information_first,
    lowering_outweighs,
    negative_samples,
    reward_law,
    three_phases,
    token_correlation,
    two_sided_bounds,
    variance_proxy,
    within_prompt_noise,
)
from trl_entropy.experiments.claims.claim import Claim

_MODULES = (
    within_prompt_noise,
    variance_proxy,
    high_entropy_tokens,
    negative_samples,
    lowering_outweighs,
    discriminator_sign,
    token_correlation,
    two_sided_bounds,
    information_first,
    bonus_bias,
    reward_law,
    three_phases,
)
CLAIMS: dict[str, Claim] = {module.CLAIM.name: module.CLAIM for module in _MODULES}
