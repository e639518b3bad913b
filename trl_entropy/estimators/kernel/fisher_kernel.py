"""Summaries of the empirical Fisher kernel K_ij = grad S_i' M grad S_j, by which completions act on one another (T12).

grad S_i are score gradients of whole completions, nats per unit of the parameter. K is computed from them exactly or
from their sketches (T13), by the consumers of `row_kernels`.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from trl_entropy.estimators.statistics.estimate import Estimate
from trl_entropy.estimators.statistics.pooled import jackknife_covariance


class Spectrum(NamedTuple):
    """The eigenvalues of K, largest first, and two measures of how many of them matter."""

    eigenvalues: Float[Tensor, "N"]
    participation_ratio: float
    effective_rank: float


class PromptNull(NamedTuple):
    """Same-prompt mean minus cross-prompt mean, and its distribution when prompts are assigned at random."""

    difference: float
    null_mean: float
    null_stddev: float
    p_value: float


def cosine_kernel(gram: Float[Tensor, "N N"]) -> Float[Tensor, "N N"]:
    """(T12): K_ij / sqrt(K_ii K_jj); nan in the row and the column of a completion without a gradient."""
    norms = gram.double().diagonal().sqrt()
    return gram.double() / norms.outer(norms)


def pair_mean(values: Float[Tensor, "N N"], selected: Bool[Tensor, "N N"], prompt_index: Int[Tensor, "N"]) -> Estimate:
    """The mean of K_ij or its cosine over the selected (i, j), with the delete-one-prompt jackknife error.

    Prompts must be independent; completions of one prompt may depend on one another. It is a ratio of sums, so that
    prompts with more pairs count more, and unbiased where the numbers of pairs are fixed. The jackknife leaves out all
    rows and columns of a prompt. `num_samples` counts completions, dof = P - 1. If nothing is selected the value is
    nan; if nothing is left without some prompt the stderr is nan.
    """
    one_hot = _one_hot(prompt_index)
    sums = _prompt_block_sums(values.double().where(selected, 0.0), one_hot)
    counts = _prompt_block_sums(selected.double(), one_hot)
    left_out = _without_each(sums) / _without_each(counts)
    variance = jackknife_covariance(left_out[:, None])
    value, stderr = torch.stack([sums.sum() / counts.sum(), variance.sqrt().squeeze()]).tolist()
    return Estimate(value, stderr, float(len(sums) - 1), len(prompt_index))


def kernel_means(
    values: Float[Tensor, "N N"], prompt_index: Int[Tensor, "N"], rewards: Float[Tensor, "N"] | None = None
) -> dict[str, Estimate]:
    """(T12): the mean of the diagonal, of same-prompt and of cross-prompt pairs, of K or of its cosine.

    With `rewards` the pairs are also split into those of equal and of unequal reward. Keys: `diagonal`, `same_prompt`,
    `cross_prompt`, and `same_prompt_equal_reward`, ... Errors as in `pair_mean`. Scores have mean zero given the
    prompt, so that on-policy, with M given, both pair means of K have the expectation 0, whatever the policy. How
    strongly completions act on one another shows in the split by reward, or in the means of squares,
    `kernel_means(values.square(), ...)`.
    """
    return {name: pair_mean(values, mask, prompt_index) for name, mask in _pair_masks(prompt_index, rewards).items()}


def spectrum(gram: Float[Tensor, "N N"]) -> Spectrum:
    """(T12): eigenvalues, participation ratio (sum l)^2 / sum l^2, effective rank exp(entropy of l / sum l).

    K must be positive semi-definite, as it is from rows and from sketches; its eigenvalues are computed as singular
    values, which rounding cannot make negative. Both counts lie in [1, N], and from a sketch they are at most its
    dimension; K = 0: nan. They are no unbiased estimates of those of more completions. Cost O(N^3). Source: Roy and
    Vetterli, EUSIPCO 2007.
    """
    eigenvalues = torch.linalg.svdvals(gram.double())
    weights = eigenvalues / eigenvalues.sum()
    return Spectrum(
        eigenvalues, float(1 / weights.square().sum()), float((-torch.special.xlogy(weights, weights)).sum().exp())
    )


def permuted_prompts(
    values: Float[Tensor, "N N"], prompt_index: Int[Tensor, "N"], num_permutations: int, generator: torch.Generator
) -> PromptNull:
    """A permutation test of whether pairs from one prompt differ from pairs from two prompts.

    Prompt labels are permuted over completions. `p_value` = (1 + permutations at least as large) / (1 + permutations),
    one-sided, exact under exchangeability. `generator` is the caller's own, on the CPU. Cost O(N^2) per permutation;
    the host reads all differences at once.
    """
    orders = [torch.randperm(len(prompt_index), generator=generator) for _ in range(num_permutations)]
    permuted = prompt_index[torch.stack(orders).to(prompt_index.device)]
    differences = torch.stack([_prompt_difference(values, labels) for labels in (prompt_index, *permuted)]).cpu()
    observed, null = float(differences[0]), differences[1:]
    at_least = int((null >= observed).sum())
    return PromptNull(observed, float(null.mean()), float(null.std()), (1 + at_least) / (1 + num_permutations))


def length_correlation(
    values: Float[Tensor, "N N"], num_tokens: Int[Tensor, "N"] | Float[Tensor, "N"], prompt_index: Int[Tensor, "N"]
) -> Estimate:
    """Pearson's correlation of K_ij, or its cosine, with T_i T_j over cross-prompt pairs; jackknife over prompts.

    A value near 1 says that the kernel mostly reflects lengths, as grad S_i is a sum over tokens. Bias O(1/P), dof = P
    - 1.
    """
    cross = prompt_index[:, None] != prompt_index
    x, y = num_tokens.double().outer(num_tokens.double()), values.double().where(cross, 0.0)
    features = [torch.ones_like(x), x, y, x * x, x * y, y * y]
    one_hot = _one_hot(prompt_index)
    sums = torch.stack([_prompt_block_sums(feature.where(cross, 0.0), one_hot) for feature in features], -1)
    left_out = _correlation(_without_each(sums))
    variance = jackknife_covariance(left_out[:, None])
    value, stderr = torch.stack([_correlation(sums.sum((0, 1))), variance.sqrt().squeeze()]).tolist()
    return Estimate(value, stderr, float(len(sums) - 1), len(prompt_index))


def _pair_masks(prompt_index: Int[Tensor, "N"], rewards: Float[Tensor, "N"] | None) -> dict[str, Bool[Tensor, "N N"]]:
    diagonal = torch.eye(len(prompt_index), dtype=torch.bool, device=prompt_index.device)
    same = prompt_index[:, None] == prompt_index
    masks = {"diagonal": diagonal, "same_prompt": same & ~diagonal, "cross_prompt": ~same}
    if rewards is None:
        return masks
    equal = rewards[:, None] == rewards
    for name in ("same_prompt", "cross_prompt"):
        masks[f"{name}_equal_reward"] = masks[name] & equal
        masks[f"{name}_unequal_reward"] = masks[name] & ~equal
    return masks


def _one_hot(prompt_index: Int[Tensor, "N"]) -> Float[Tensor, "N P"]:
    return (prompt_index[:, None] == prompt_index.unique()).double()


def _prompt_block_sums(values: Float[Tensor, "N N"], one_hot: Float[Tensor, "N P"]) -> Float[Tensor, "P P"]:
    return one_hot.T @ values @ one_hot


def _without_each(sums: Float[Tensor, "P P *K"]) -> Float[Tensor, "P *K"]:
    """For each prompt p, the total over all pairs of prompts without p."""
    own = sums.diagonal(dim1=0, dim2=1).movedim(-1, 0)
    return sums.sum((0, 1)) - sums.sum(0) - sums.sum(1) + own


def _prompt_difference(values: Float[Tensor, "N N"], prompt_index: Int[Tensor, "N"]) -> Float[Tensor, ""]:
    masks = _pair_masks(prompt_index, None)
    same, cross = (_mean(values, masks[name]) for name in ("same_prompt", "cross_prompt"))
    return same - cross


def _mean(values: Float[Tensor, "N N"], selected: Bool[Tensor, "N N"]) -> Float[Tensor, ""]:
    """As `values[selected].mean()`, for which the host would have to know how many there are."""
    return values.double().where(selected, 0.0).sum() / selected.sum()


def _correlation(sums: Float[Tensor, "*P six"]) -> Float[Tensor, "*P"]:
    _, x, y, xx, xy, yy = (sums / sums[..., :1]).unbind(-1)
    return (xy - x * y) / ((xx - x * x) * (yy - y * y)).sqrt()
