"""Which part of a step, which completion and which token made the first-order entropy change (T9).

delta_linear = grad h . dtheta, and dtheta is a sum of parts (T5), so that the change is exactly the sum of theirs.
grad h comes from a probe batch E that is independent of the update batch U. If it came from U, the contribution of
each completion would include what the completion does to itself (T17).
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from trl_entropy.estimators.optimizer.adamw import UpdateParts
from trl_entropy.estimators.statistics.estimate import Estimate
from trl_entropy.estimators.statistics.pooled import PooledParts, sum_over_prompts


class UpdateProducts(NamedTuple):
    """(T9): the product of grad h with each part of the update, summed over the parameters so far; nats per token."""

    momentum: float
    weight_decay: float
    gradient: float


@dataclass(frozen=True)
class Attribution:
    """(T9): delta_linear = momentum + weight decay + other terms + sum of completions + rounding, in nats per token.

    `completions` are delta_i, or delta_ik summed over tokens. `other` holds, by name, the contributions of further
    terms of the loss such as a bonus, in any shape. `rounding` is what remains: the rounding of float32 parameters,
    and any part that was not named. It serves as a check.
    """

    whole: float
    momentum: float
    weight_decay: float
    completions: Float[Tensor, "B"]
    other: dict[str, Float[Tensor, "..."]] = field(default_factory=dict)

    @property
    def rounding(self) -> float:
        """The whole less all named parts."""
        others = sum(float(part.double().sum()) for part in self.other.values())
        return self.whole - self.momentum - self.weight_decay - others - self.gradient

    @property
    def gradient(self) -> float:
        """The sum of the completions' contributions."""
        return float(self.completions.double().sum())

    @property
    def relative_rounding(self) -> float:
        """Rounding over the sum of the absolute values of all parts, completion by completion; 0/0: nan."""
        by_completion = sum(float(part.double().abs().sum()) for part in (self.completions, *self.other.values()))
        whole = abs(self.momentum) + abs(self.weight_decay) + by_completion
        return self.rounding / whole if whole else math.nan

    def share(self, part: float) -> float:
        """A part over the whole; outside [0, 1] where parts have opposite signs, nan or inf where the whole is 0."""
        return float(torch.tensor(part, dtype=torch.float64) / self.whole)


def update_products(parameters: Iterable[tuple[Float[Tensor, "..."], UpdateParts]]) -> UpdateProducts:
    """(T9): grad h . (momentum, decay, gradient part), in float64, summed over parameters and read by the host once.

    Each parameter comes with grad h for it (`entropy_surrogate`) and its parts (`adamw_update_parts`).
    """
    products = (torch.stack([(g.double() * part.double()).sum() for part in parts]) for g, parts in parameters)
    return UpdateProducts(*sum(products, torch.zeros((), dtype=torch.float64)).expand(3).tolist())


def completion_contributions(gradient_products: Float[Tensor, "B"], coefficient: float) -> Float[Tensor, "B"]:
    """(T9): delta_i = -lr c (1-b1)/(1-b1^t) g_i' M grad h, nats per token.

    `gradient_products` are g_i' M grad h, g_i completion i's share of the unclipped loss gradient, g = sum_i g_i;
    `coefficient` is `gradient_coefficient`; M is that of the step, this gradient included (T5).
    """
    return -coefficient * gradient_products.double()


def token_contributions(
    loss_coefficients: Float[Tensor, "B T"],
    directional_derivatives: Float[Tensor, "B T"],
    loss_mask: Bool[Tensor, "B T"] | Int[Tensor, "B T"],
    coefficient: float,
) -> Float[Tensor, "B T"]:
    """(T9): delta_ik = lr c (1-b1)/(1-b1^t) alpha_ik D_ik, nats per token; 0 under the mask.

    `directional_derivatives` are D_ik, of S_ik along M grad h, from one forward-mode pass over U. alpha_ik =
    -dLoss/dS_ik comes from `on_policy_coefficients` or, for any other loss, from the loss itself. Summed over k the
    contributions are delta_i. Given U, M and the step they are unbiased over E if h and E[T] are given; with estimates
    of these the bias is O(1/|E|).
    """
    products = loss_coefficients.double() * directional_derivatives.double()
    return (coefficient * products).where(loss_mask.bool(), 0.0)


def on_policy_coefficients(
    advantages: Float[Tensor, "B *T"],
    loss_mask: Bool[Tensor, "B T"] | Int[Tensor, "B T"],
    num_completions: int,
    max_completion_length: int,
) -> Float[Tensor, "B T"]:
    """(T9): alpha_ik = -dLoss/dS_ik of (T2) at ratio 1, A_i / (P G L), per nat; 0 under the mask.

    `num_completions` = P G counts the whole step, over all micro-batches and ranks. `advantages` are those that the
    loss gets, (B,) or (B, T); with `length_normalizer="group_max"` they include the factor L / L_i.
    """
    mask = loss_mask.bool()
    per_token = advantages.double().reshape(len(advantages), -1).expand(mask.shape)
    return (per_token / (num_completions * max_completion_length)).where(mask, 0.0)


def kl_coefficients(
    reference_gradient: Float[Tensor, "B T"],
    log_ratio: Float[Tensor, "B T"],
    loss_mask: Bool[Tensor, "B T"] | Int[Tensor, "B T"],
    correction: str | None,
) -> Float[Tensor, "B T"]:
    """(T9): dLoss/dS_ik of TRL's KL term alone, per nat, from the derivative by the reference's log-probabilities.

    The term is sum_ik w_ik c_i(k) KL_ik with KL_ik = e^r - r - 1, r = `log_ratio` = S^ref_ik - S_ik, and c the
    importance ratio or 1. `reference_gradient` is its derivative by S^ref, w c (e^r - 1), which one backward pass
    gives. The derivative by S is the negative of that; an importance ratio c adds w c KL_ik, at its own token
    (`correction="token"`) or spread over the completion's tokens ("sequence"). None: there is no ratio
    (`use_bias_correction_kl=False`).
    """
    mask, by_reference, r = loss_mask.bool(), reference_gradient.double(), log_ratio.double()
    by_ratio = (by_reference * (1 - torch.where(r == 0, 1.0, r / torch.expm1(r)))).where(mask, 0.0)  # w c KL_ik
    if correction is None:
        by_ratio = torch.zeros_like(by_ratio)
    elif correction == "sequence":
        lengths = mask.sum(dim=1, keepdim=True).clamp(min=1)
        by_ratio = (by_ratio.sum(dim=1, keepdim=True) / lengths).expand_as(by_ratio)
    return (by_ratio - by_reference).where(mask, 0.0)


def bin_index(values: Float[Tensor, "*shape"], edges: Sequence[float]) -> Int[Tensor, "*shape"]:
    """The number of edges at or below each value, which is its bin: 0 to len(edges). Fixed edges let steps be merged.

    Edges must increase. Rare tokens, for example, are `bin_index(per_token_logps, [math.log(0.1)]) == 0`, and wrong
    answers are rewards below an edge; advantages, entropies, lengths and positions are binned in the same way.
    """
    boundaries = torch.tensor(edges, dtype=torch.float64, device=values.device)
    return torch.bucketize(values.double(), boundaries, right=True)


def crossed(first: Int[Tensor, "B T"], second: Int[Tensor, "B T"], num_second: int) -> Int[Tensor, "B T"]:
    """Each token's category in a cross of two classifications: `first` * `num_second` + `second`."""
    return first * num_second + second


def category_sums(
    contributions: Float[Tensor, "B T"],
    categories: Int[Tensor, "B T"],
    loss_mask: Bool[Tensor, "B T"] | Int[Tensor, "B T"],
    prompt_index: Int[Tensor, "B"],
    num_prompts: int,
    num_categories: int,
) -> tuple[Float[Tensor, "P C"], Int[Tensor, "C"]]:
    """(T9): per prompt and category the sum of delta_ik in nats per token, and each category's number of tokens.

    Both can be added over micro-batches and ranks. `prompt_index` < `num_prompts` counts within the step. Prompts
    without a gradient count too, with sums of 0.
    """
    mask = loss_mask.bool()
    cells = (prompt_index[:, None] * num_categories + categories)[mask]
    sums = contributions.new_zeros(num_prompts * num_categories, dtype=torch.float64)
    sums = sums.index_add(0, cells, contributions.double()[mask])
    counts = torch.bincount(categories[mask], minlength=num_categories)
    return sums.view(num_prompts, num_categories), counts


@dataclass(frozen=True)
class CategoryRecord:
    """(T9): the entropy change by category of tokens, summed over many steps with counts and errors, and divided once.

    Errors are those over fresh prompts in U, by the jackknife, with grad h, M and the step given. The categories
    partition the tokens of U, so that shares sum to 1. They are shares of the gradient part of the change, and lie
    outside [0, 1] where categories have opposite signs.
    """

    names: tuple[str, ...]
    parts: PooledParts
    counts: Int[Tensor, "C"]

    @classmethod
    def empty(cls, names: Sequence[str]) -> "CategoryRecord":
        """The record of no steps, with a name for each category."""
        return cls(tuple(names), PooledParts.empty(len(names)), torch.zeros(len(names), dtype=torch.int64))

    def update(self, prompt_sums: Float[Tensor, "P C"], counts: Int[Tensor, "C"]) -> "CategoryRecord":
        """The record with one step's `category_sums` added, all ranks and micro-batches together."""
        parts = self.parts.update(sum_over_prompts(prompt_sums))
        return CategoryRecord(self.names, parts, self.counts + counts.cpu())

    def merge(self, other: "CategoryRecord") -> "CategoryRecord":
        """The record of both sets of steps. ValueError if their categories differ."""
        if self.names != other.names:
            raise ValueError(f"records of different categories: {self.names} and {other.names}")
        return CategoryRecord(self.names, self.parts.merge(other.parts), self.counts + other.counts)

    @property
    def present(self) -> tuple[str, ...]:
        """The categories of which there was a token."""
        return tuple(name for name, count in zip(self.names, self.counts.tolist(), strict=True) if count)

    def change(self, *names: str) -> Estimate:
        """The mean over steps of the entropy change that tokens of these categories make, nats per token."""
        return self.parts.mean(self._members(names))

    def share(self, *names: str) -> Estimate:
        """These categories' share of the change that all tokens make; both are summed over steps, then divided.

        With categories correct/incorrect x rare/common, `share("incorrect/rare")` is the claim of Cui et al.
        (arXiv:2505.22617) as one number. Bias O(1/(steps P)); where the whole is near 0 use `share_interval`.
        """
        return self.parts.ratio(self._members(names), self._members(self.names))

    def share_interval(self, *names: str, confidence: float = 0.95) -> tuple[float, float]:
        """Fieller's confidence interval of the share; (-inf, inf) where the whole is consistent with 0."""
        return self.parts.ratio_interval(self._members(names), self._members(self.names), confidence)

    def token_share(self, *names: str) -> float:
        """These categories' share of the tokens, with which their share of the change is to be compared."""
        return float(self._members(names) @ self.counts.double() / self.counts.sum())

    def _members(self, names: Sequence[str]) -> Float[Tensor, "C"]:
        if unknown := set(names) - set(self.names):
            raise ValueError(f"no categories {sorted(unknown)}: there are {list(self.names)}")
        return torch.tensor([float(name in names) for name in self.names], dtype=torch.float64)
