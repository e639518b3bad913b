"""The entropy of the next-token distribution and the log-probability of the token drawn, from logits in chunks."""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def entropy_and_logps(
    logits: Float[Tensor, "*shape V"], token_ids: Int[Tensor, "*shape"], temperature: float = 1.0
) -> tuple[Float[Tensor, "*shape"], Float[Tensor, "*shape"]]:
    """Per-token entropy H (Rao-Blackwell form) and log-probability S of the drawn token, in nats.

    With p = softmax(logits / temperature): H = -sum_v p_v log p_v and S = log p_o. The logits that come from position
    k-1 predict token k: the caller shifts. -S is the sampled form of H (surprisal): the same expectation, no smaller
    variance. Computed in float32, or in float64 for float64 logits. Logits of -inf give nan (0 times inf): this is the
    entropy of the full vocabulary.
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    log_probs = (logits / temperature).log_softmax(-1)
    token_entropy = -(log_probs.exp() * log_probs).sum(-1)
    return token_entropy, log_probs.gather(-1, token_ids.unsqueeze(-1)).squeeze(-1)


def chunked_entropy_and_logps(
    hidden_states: Float[Tensor, "*shape D"],
    lm_head: Callable[[Float[Tensor, "n D"]], Float[Tensor, "n V"]],
    token_ids: Int[Tensor, "*shape"],
    temperature: float = 1.0,
    chunk_size: int = 1024,
    recompute: bool = True,
) -> tuple[Float[Tensor, "*shape"], Float[Tensor, "*shape"]]:
    """`entropy_and_logps` of `lm_head(hidden_states)` with the logits of at most `chunk_size` tokens alive at a time.

    `lm_head` is the module, or a function that closes over its weight; gradients reach what it closes over. With
    `recompute` the logits of a chunk are dropped after the forward and made again in the backward pass. That holds for
    `backward`, for double backward (`create_graph=True`; each chunk's logits then live until the second pass frees
    them), and for forward mode, also nested (`torch.func.jvp` of a `jvp`). The reverse transforms of torch.func
    (`grad`, `vjp`, and so `jvp` of `grad`) raise on recomputation: give `recompute=False`, whose only cost is memory.
    """
    shape = token_ids.shape
    chunks = zip(hidden_states.flatten(0, -2).split(chunk_size), token_ids.flatten().split(chunk_size), strict=True)

    def statistics(hidden, ids):
        return entropy_and_logps(lm_head(hidden), ids, temperature)

    def recomputed(hidden, ids):
        return checkpoint(statistics, hidden, ids, use_reentrant=False, preserve_rng_state=False)

    results = [(recomputed if recompute else statistics)(hidden, ids) for hidden, ids in chunks]
    token_entropy, per_token_logps = (torch.cat(parts).reshape(shape) for parts in zip(*results, strict=True))
    return token_entropy, per_token_logps
