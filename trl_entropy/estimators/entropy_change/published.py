"""All published predictors of a step's entropy change together, from what is known of each token before the step."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from trl_entropy.estimators.entropy_change.rivals import (
    delta_covariance,
    natural_gradient_terms,
    policy_gradient_terms,
)


def published_predictions(
    per_token_logps: Float[Tensor, "B T"],
    token_entropy: Float[Tensor, "B T"],
    advantages: Float[Tensor, " B"],
    loss_mask: Bool[Tensor, "B T"] | Int[Tensor, "B T"],
    mean_discriminator: Float[Tensor, "B T"] | None = None,
) -> dict[str, float]:
    """
    What formulas in print say of the step that is made from these completions, each up to a positive factor that no
    formula knows (the step length is not that of AdamW): compare by correlation and by sign.

    With p = pi(token), H the entropy of the distribution that it was drawn from, A its advantage, and means over all
    tokens of the completions:

    - `cov_natural`: -Cov(log p, A), Cui et al., Theorem 2, on which Clip-Cov and KL-Cov are built (arXiv:2505.22617).
    - `cov_policy_gradient`: -Cov(log p, p A), their Theorem 1.
    - `cov_sequence`: -Cov over completions of (mean log p, A): the covariance of whole responses of their figure 8.
    - `centred`: mean of -A (log p + H), the first with log p centred on each token's own distribution.
    - `surprisal`: mean of -A log p, STARE's form (arXiv:2606.19236).
    - `discriminator`: mean of -A S with S = p (H + log p) (arXiv:2602.03392); `discriminator_centred`: S less its
      mean over the batch, as that paper's clipping takes it, since E[S] over each distribution is seldom at hand.
    - `steer`: mean of -A (1 - p) S, STEER's estimate on policy (arXiv:2510.10150); `steer_code`: the same over p, as
      its released code divides by the old probability.
    - `high_entropy`: `centred` on the fifth of the tokens with the largest H (arXiv:2506.01939).

    With `mean_discriminator`, E[S] over each token's own distribution, also:

    - `discriminator_exact`: mean of -A (S - E[S]), which for one state with a logit for each action is the change by
      Delta z = A (e_token - p), exactly to first order (arXiv:2602.03392, arXiv:2602.09782).
    - `raising`, `lowering`: the sums of its positive and of its negative terms over the number of tokens, the two
      flows that OPEFO weighs against each other (arXiv:2605.11491).

    All in nats times advantage; inputs in nats at the sampling temperature.
    """
    chosen = loss_mask.bool()
    logp, entropy = per_token_logps.double()[chosen], token_entropy.double()[chosen]
    advantage = advantages.double()[:, None].expand_as(loss_mask)[chosen]
    p, centred = logp.exp(), logp + entropy
    s = p * centred
    tokens, drawn = (per_token_logps, advantages, chosen), chosen.any(1)
    means = torch.where(chosen, per_token_logps.double(), 0.0).sum(1) / chosen.sum(1).clamp(min=1)
    most = max(1, len(entropy) // 5)
    high = entropy >= entropy.kthvalue(len(entropy) - most + 1).values
    found = {
        "cov_natural": delta_covariance(natural_gradient_terms(*tokens)).value,
        "cov_policy_gradient": delta_covariance(policy_gradient_terms(*tokens)).value,
        "cov_sequence": delta_covariance(natural_gradient_terms(means[:, None], advantages, drawn[:, None])).value,
        "centred": -(advantage * centred).mean(),
        "surprisal": -(advantage * logp).mean(),
        "discriminator": -(advantage * s).mean(),
        "discriminator_centred": -(advantage * (s - s.mean())).mean(),
        "steer": -(advantage * (1 - p) * s).mean(),
        "steer_code": -(advantage * (1 - p) * centred).mean(),
        "high_entropy": -(advantage * centred)[high].sum() / len(logp),
    }
    if mean_discriminator is not None:
        exact = token_changes(logp, entropy, advantage, mean_discriminator.double()[chosen])
        found["discriminator_exact"] = exact.mean()
        found["raising"], found["lowering"] = exact.clamp(min=0).mean(), exact.clamp(max=0).mean()
    return {name: float(value) for name, value in found.items()}


def token_changes(
    logps: Float[Tensor, "*N"],
    entropy: Float[Tensor, "*N"],
    advantages: Float[Tensor, "*N"],
    mean_discriminator: Float[Tensor, "*N"],
) -> Float[Tensor, "*N"]:
    """-A (S - E[S]) of each token, see [`published_predictions`]; nats times advantage."""
    return -advantages * (logps.exp() * (entropy + logps) - mean_discriminator)
