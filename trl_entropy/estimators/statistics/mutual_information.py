"""How much completions tell of their prompts: bounds on I(prompt; completion) (T23)."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from trl_entropy.estimators.statistics.estimate import Estimate


class InformationBounds(NamedTuple):
    """
    Bounds on the mutual information of prompt and completion, nats per completion, and what they stand beside.

    `conditional_entropy` is the entropy of a whole completion given its prompt, nats; `identified` the fraction of
    completions that are likelier under their own prompt than under any other, 1/P by chance.
    """

    lower: Estimate
    upper: Estimate
    conditional_entropy: Estimate
    identified: Estimate


def mutual_information(
    logps: Float[Tensor, "N P"], own: Int[Tensor, "N"], log_weights: Float[Tensor, "N"] | None = None
) -> InformationBounds:
    """(T23): bounds on I(X; O) from completions scored under all prompts, with the jackknife's errors over prompts.

    lower  mean_i [S_i(x_i) - log (1/P sum_j exp S_i(x_j))]               over all P prompts, its own included
    upper  mean_i [S_i(x_i) - log (1/(P-1) sum_{j != own} exp S_i(x_j))]  over the other prompts

    `logps` are S_i(x_j), log-probabilities of completion i under prompt j, nats; `own` is the column of each one's
    prompt; `log_weights` are log pi(o_i | x_i) less that of what drew it, where that is not the policy. For prompts
    drawn independently E[lower] <= I <= E[upper], and lower <= log P for any sample. Given the prompts, lower is
    unbiased for the information about which of *these* P it was, by RAGEN-2 (arXiv:2604.06268) the measure of collapse
    to a template. Bounds: B. Poole et al. (2019, arXiv:1905.06922), section 2, where the conditional density is known.
    There must be at least three prompts.
    """
    everything = torch.ones_like(logps[:1], dtype=torch.bool).squeeze(0)
    whole = _means(logps, own, log_weights, everything)
    num_prompts = logps.shape[1]
    replicates = [
        _means(logps, own, log_weights, everything.scatter(0, _at(own, out), False)) for out in range(num_prompts)
    ]
    table = torch.stack(replicates)
    spread = (num_prompts - 1) / num_prompts * (table - table.mean(0)).square().sum(0)
    columns = zip(whole.tolist(), spread.sqrt().tolist(), strict=True)
    return InformationBounds(*(Estimate(*pair, float(num_prompts - 1), len(logps)) for pair in columns))


def _at(like: Int[Tensor, "N"], place: int) -> Int[Tensor, "1"]:
    return like.new_tensor([place])


def _means(
    logps: Float[Tensor, "N P"], own: Int[Tensor, "N"], log_weights: Float[Tensor, "N"] | None, kept: Bool[Tensor, "P"]
) -> Float[Tensor, "4"]:
    """The four numbers of the completions of the prompts that are kept, scored under these alone."""
    rows = kept[own]
    scores = logps.double()[rows][:, kept]
    place = (kept.cumsum(0) - 1)[own[rows]][:, None]
    mine = scores.gather(1, place).squeeze(1)
    others = scores.scatter(1, place, -torch.inf)
    counts = torch.tensor([scores.shape[1], scores.shape[1] - 1], dtype=torch.float64, device=scores.device).log()
    terms = torch.stack(
        [
            mine - scores.logsumexp(1) + counts[0],
            mine - others.logsumexp(1) + counts[1],
            -mine,
            (mine > others.amax(1)).double(),
        ]
    )
    if log_weights is None:
        return terms.mean(1)
    weights = log_weights.double()[rows].exp()
    return (terms * weights).sum(1) / weights.sum()
