"""How a step's loss depends on the scores of its completions, from the backward pass of training itself (T9)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from trl_entropy.config.probe_checks import ProbeChecks
from trl_entropy.estimators.attribution.shares import kl_coefficients
from trl_entropy.rollouts.batch import TrainingBatch


class LossCoefficients(NamedTuple):
    """
    alpha_ik = -dLoss/dS_ik per nat, by term of a loss averaged over ranks; None for a term that the loss lacks.

    Attributes:
        policy: of all terms but the KL.
        kl: of the KL to the reference.
        entropy_bonus: -dLoss/dH_ik, H_ik the token's entropy.
    """

    policy: Float[Tensor, "B T"]
    kl: Float[Tensor, "B T"] | None = None
    entropy_bonus: Float[Tensor, "B T"] | None = None

    @classmethod
    def on_policy(
        cls, advantages: Float[Tensor, "B *T"], loss_mask: Int[Tensor, "B T"], num_completions: int, max_length: int
    ) -> LossCoefficients:
        """
        Those of the on-policy Dr-GRPO loss (T2), A_ik / (P G L): nothing is clipped at ratio 1.

        Args:
            advantages: those that the loss gets, `length_normalizer` included.
            loss_mask: 1 for the tokens that the policy drew.
            num_completions: P G, of all processes.
            max_length: `max_completion_length`, L.
        """
        per_token = advantages.double().reshape(len(advantages), -1).expand(loss_mask.shape)
        return cls(per_token * loss_mask / (num_completions * max_length))

    @property
    def of_logps(self) -> Float[Tensor, "B T"]:
        """-dLoss/dS_ik of the whole loss."""
        return self.policy if self.kl is None else self.policy + self.kl

    def rows(self, index: Int[Tensor, " n"]) -> LossCoefficients:
        """Those of the rows that `index` selects."""
        return LossCoefficients(*(None if part is None else part[index] for part in self))

    def mean(self, loss_mask: Int[Tensor, "B T"]) -> Float[Tensor, " B"]:
        """Of each completion: what all its tokens have, where the loss weighs them alike."""
        return (self.of_logps * loss_mask).sum(1) / loss_mask.sum(1).clamp(min=1)

    def times(self, factor: float) -> LossCoefficients:
        """Those of the loss times `factor`."""
        return LossCoefficients(*(None if part is None else factor * part for part in self))

    def surrogate(
        self,
        token_entropy: Float[Tensor, "n t"],
        per_token_logps: Float[Tensor, "n t"],
        loss_mask: Int[Tensor, "n t"],
        index: Int[Tensor, " n"],
    ) -> Float[Tensor, ""]:
        """
        A scalar whose gradient is what the rows `index` add to the gradient of the step's loss; its value has no
        meaning. `t` may be less than T where the rows need no more columns.
        """
        width = per_token_logps.shape[1]
        terms = self.of_logps[index, :width].double() * per_token_logps.double()
        if self.entropy_bonus is not None:
            terms = terms + self.entropy_bonus[index, :width].double() * token_entropy.double()
        return -terms.where(loss_mask.bool(), 0.0).sum()


class LossCoefficientRecorder:
    """
    Hooks on the inputs of TRL's loss: log-probabilities, entropies, and the reference's log-probabilities.

    The KL is the only term that depends on the reference, so its coefficients follow from the loss's derivative with
    respect to the reference's log-probabilities. No further pass is made, and training stays bit-identical. Local.
    """

    def __init__(self) -> None:
        self._by_logps: list[Tensor] = []
        self._by_entropy: list[Tensor] = []
        self._by_reference: list[Tensor] = []
        self._log_ratios: list[Tensor] = []

    @contextlib.contextmanager
    def around(self, inputs: TrainingBatch) -> Iterator[None]:
        """Around a micro-batch's forward and backward: has backward differentiate by the reference, if any."""
        given = inputs.get("ref_per_token_logps")
        if given is not None:
            inputs["ref_per_token_logps"] = given.detach().clone().requires_grad_()
            inputs["ref_per_token_logps"].register_hook(self._by_reference.append)
        try:
            yield
        finally:
            if given is not None:
                inputs["ref_per_token_logps"] = given

    def watch(
        self, inputs: TrainingBatch, loss_logps: Float[Tensor, "b T"], loss_entropy: Float[Tensor, "b T"]
    ) -> None:
        """Sets the hooks of a micro-batch; to be called between its forward and its backward."""
        loss_logps.register_hook(self._by_logps.append)
        if loss_entropy.requires_grad:
            loss_entropy.register_hook(self._by_entropy.append)
        if "ref_per_token_logps" in inputs:
            self._log_ratios.append(inputs["ref_per_token_logps"].detach() - loss_logps.detach())

    def forget(self) -> None:
        """Discards what was recorded since the last step."""
        for parts in (self._by_logps, self._by_entropy, self._by_reference, self._log_ratios):
            parts.clear()

    def of_step(self, mask: Int[Tensor, "B T"], args: ProbeChecks, num_processes: int) -> LossCoefficients:
        """
        The coefficients of the step's micro-batches, which are then discarded.

        Args:
            mask: of the step's completions on this process.
            args: of the loss.
            num_processes: over which the loss is averaged.
        """
        correction = args.kl_correction()
        total = _joined(self._by_logps, mask).double()
        kl = entropy = None
        if self._by_reference:
            by_reference, log_ratio = _joined(self._by_reference, mask), _joined(self._log_ratios, mask)
            kl = kl_coefficients(by_reference, log_ratio, mask, correction)
        if self._by_entropy:
            entropy = _joined(self._by_entropy, mask).double() / -num_processes
        policy = total if kl is None else total - kl
        return LossCoefficients(policy / -num_processes, None if kl is None else kl / -num_processes, entropy)


def _joined(parts: list[Tensor], mask: Tensor) -> Float[Tensor, "B T"]:
    """The micro-batches' rows, as wide as the rollouts'; `parts` is emptied."""
    padded = [torch.nn.functional.pad(part, (0, mask.shape[1] - part.shape[1])) for part in parts]
    parts.clear()
    return torch.cat(padded)
