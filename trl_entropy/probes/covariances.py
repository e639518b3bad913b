"""The covariances (T11) of a step, added up over its micro-batches."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from trl_entropy.estimators.entropy_change.rivals import (
    CovarianceTerms,
    delta_covariance,
    natural_gradient_terms,
    policy_gradient_terms,
)

_TERMS = {"cov_natural": natural_gradient_terms, "cov_policy_gradient": policy_gradient_terms}


class Covariances:
    """The terms of both covariances of this rank's completions of a step, until they are reduced."""

    def __init__(self) -> None:
        self._parts: dict[str, list[Tensor]] = {name: [] for name in _TERMS}

    def clear(self) -> None:
        for parts in self._parts.values():
            parts.clear()

    def add(self, *micro_batch: Any) -> None:
        """A micro-batch: log-probabilities of its tokens, advantages and mask, as the estimators take them."""
        for name, terms in _TERMS.items():
            self._parts[name].append(torch.stack(terms(*micro_batch), dim=1))

    def logged(self, accelerator: Accelerator) -> dict[str, float]:
        """The metrics of the step, whose terms are then forgotten. Collective."""
        found = {}
        for name, parts in self._parts.items():
            columns = accelerator.gather(torch.cat(parts)).unbind(1)
            found[f"entropy/delta_{name}"] = delta_covariance(CovarianceTerms(*columns)).value.item()
        self.clear()
        return found
