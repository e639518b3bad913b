"""What a step did to one quantity on a probe batch: its change, the predictions of it, and their agreement so far."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from accelerate import Accelerator
from jaxtyping import Float, Int
from torch import Tensor

from trl_entropy.estimators.entropy_change.expectation import expectation_terms
from trl_entropy.estimators.entropy_change.step_change import PointTerms
from trl_entropy.estimators.entropy_change.step_estimates import StepEstimates, step_estimates
from trl_entropy.estimators.statistics.importance import effective_sample_size
from trl_entropy.probes.agreement import RunningAgreement
from trl_entropy.probes.logged import with_stderr
from trl_entropy.runs.state import StateDict


class StepChanges:
    """
    Logs the changes of one quantity, step after step, under keys that begin with its name: `NAME/probe_batch`,
    `NAME/delta_*`, `NAME/error_*`, `NAME/half_*`, and over the run `NAME/integral_*`, `NAME/same_sample_*`,
    `NAME/cross_*`.

    Args:
        name: `entropy`, or a key of [`keys_of_quantities`].
        every_step: whether every step is measured, so that the changes add up to the run's.
    """

    def __init__(self, name: str, every_step: bool) -> None:
        self.name, self.every_step, self.agreement = name, every_step, RunningAgreement(name)

    def add(
        self, before: PointTerms, after: PointTerms, prompts: Int[Tensor, " B"], planned: PointTerms | None = None
    ) -> dict[str, float]:
        """
        The metrics of a step.

        Args:
            before, after, planned: of [`step_changes`], completions of all ranks.
            prompts: the prompt of each completion.
        """
        return self.add_estimates(*step_estimates(before, after, prompts, planned))

    def add_estimates(self, found: StepEstimates) -> dict[str, float]:
        """The same, of what the step did to the quantity."""
        self.measured = found.changes["measured"]
        self._add_to_agreement(found)
        logged = with_stderr(f"{self.name}/probe_batch", found.start)
        for name, change in found.changes.items():
            logged |= with_stderr(f"{self.name}/delta_{name}", change)
        for name, error in found.errors.items():
            logged |= with_stderr(f"{self.name}/error_{name}", error)
        for label, half in zip("ab", found.halves, strict=False):
            for name, change in half.items():
                logged |= with_stderr(f"{self.name}/half_{label}_{name}", change)
            logged[f"{self.name}/half_{label}_num_prompts"] = half["measured"].dof + 1
        return logged

    def _add_to_agreement(self, found: StepEstimates) -> None:
        """
        Add the changes to the integrals; the pairs on the same completions; and those that predict on every second
        prompt of E and measure on the others: unlike on the same completions, the two share no sampling error, so that
        their agreement is a test of the prediction.
        """
        for name, change in found.changes.items():
            if self.every_step:
                self.agreement.add_change(name, found.start.value, change.value)
            if name != "measured":
                self.agreement.add_pair(f"same_sample_{name}", change, self.measured, found.errors[name])
        if found.halves:
            predicting, measuring = found.halves
            for name, change in predicting.items():
                self.agreement.add_pair(f"cross_{name}", change, measuring["measured"])


class QuantityChanges:
    """
    The same of every number of the completions (T21): reward, length, metrics; one [`StepChanges`] for each.

    Attributes:
        agreements: of the quantities of the step that was added last.
    """

    def __init__(self, every_step: bool) -> None:
        self.every_step, self._changes = every_step, dict[str, StepChanges]()
        self.agreements: list[RunningAgreement] = []

    def add(
        self,
        values: dict[str, Float[Tensor, " B"]],
        log_weights: Sequence[Float[Tensor, "B _"]],
        prompts: Int[Tensor, " B"],
    ) -> dict[str, float]:
        """
        The metrics of a step.

        Args:
            values: by key, of the completions of all ranks.
            log_weights: [`log_weight_sums`] before and after the step.
        """
        sizes = [effective_sample_size(weights[:, 0].exp()).item() for weights in log_weights]
        logged = {"entropy/importance_ess_sequence": min(sizes)}  # at the end whose policy drew E it is the largest
        columns = torch.stack(list(values.values()), dim=1)
        before, after = (expectation_terms(columns, weights, prompts) for weights in log_weights)
        for key, found in zip(values, step_estimates(before, after, prompts), strict=True):
            logged |= self._changes.setdefault(key, StepChanges(key, self.every_step)).add_estimates(found)
        self.agreements = [self._changes[key].agreement for key in values]
        return logged

    def state_dict(self) -> StateDict:
        return {key: one.agreement.state_dict() for key, one in self._changes.items()}

    def load_state_dict(self, state: StateDict) -> None:
        self._changes = {key: StepChanges(key, self.every_step) for key in state}
        for key, one in self._changes.items():
            one.agreement.load_state_dict(state[key])


def gathered_on_host(accelerator: Accelerator, *parts: Float[Tensor, "B _"]) -> list[Float[Tensor, "N _"]]:
    """The rows of all ranks, on the CPU: a few numbers of each completion, that are read often. Collective."""
    columns = accelerator.gather(torch.cat(parts, dim=1)).cpu()
    return list(columns.split([part.shape[1] for part in parts], dim=1))
