"""The entropy of the next-token distribution and the log-probability of the token drawn, from logits."""

import torch
from jaxtyping import Float, Int
from torch import Tensor


def entropy_and_logps(
    logits: Float[Tensor, "*shape V"], token_ids: Int[Tensor, "*shape"], temperature: float = 1.0
) -> tuple[Float[Tensor, "*shape"], Float[Tensor, "*shape"]]:
    """Per-token entropy H (Rao-Blackwell form) and log-probability S of the drawn token, in nats.

    With p = softmax(logits / temperature): H = -sum_v p_v log p_v and S = log p_o. The logits from position k-1
    predict token k, and the caller shifts them. -S is the sampled form of H (surprisal), with the same expectation and
    no smaller variance. Computed in float32, or in float64 for float64 logits. Logits of -inf give nan (0 times inf),
    since this is the entropy of the full vocabulary.
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    # Dividing by 1 changes nothing and takes the memory of the logits once more
    log_probs = (logits if temperature == 1 else logits / temperature).log_softmax(-1)
    token_entropy = -(log_probs.exp() * log_probs).sum(-1)
    return token_entropy, log_probs.gather(-1, token_ids.unsqueeze(-1)).squeeze(-1)
