"""What a step did to one quantity on a probe batch: its change, the predictions of it, and their agreement so far."""

from __future__ import annotations

from jaxtyping import Float, Int
from torch import Tensor

from trl_entropy.estimators.entropy_change.delta_entropy import policy_entropy
from trl_entropy.estimators.entropy_change.expectation import expectation_terms
from trl_entropy.estimators.entropy_change.step_change import PointTerms, rows, step_changes
from trl_entropy.estimators.statistics.estimate import Estimate, Linearization
from trl_entropy.estimators.statistics.importance import effective_sample_size
from trl_entropy.probes.agreement import RunningAgreement
from trl_entropy.probes.logged import changes_logged, with_stderr
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
        changes = step_changes(before, after, planned)
        start = policy_entropy(before.terms).estimate(prompts)
        logged = changes_logged(self.name, changes, prompts) | with_stderr(f"{self.name}/probe_batch", start)
        self.measured = changes["measured"].estimate(prompts)
        self._add_to_agreement(changes, start.value, prompts)
        return logged | self._halves(before, after, prompts, planned)

    def _add_to_agreement(self, changes: dict[str, Linearization], start: float, prompts: Tensor) -> None:
        """Add the pairs on the same completions, and the changes to the integrals."""
        for name, change in changes.items():
            if self.every_step:
                self.agreement.add_change(name, start, change.value.item())
            if name != "measured":
                difference = (change - changes["measured"]).estimate(prompts)
                self.agreement.add_pair(f"same_sample_{name}", change.estimate(prompts), self.measured, difference)

    def _halves(
        self, before: PointTerms, after: PointTerms, prompts: Tensor, planned: PointTerms | None
    ) -> dict[str, float]:
        """
        Predict on every second prompt of E and measure on the others: unlike on the same completions, the two share no
        sampling error, so that their agreement is a test of the prediction. Nothing with fewer than 4 prompts, of
        which one half has no standard error.
        """
        halves: list[dict[str, Estimate]] = []
        numbers = prompts.unique(return_inverse=True)[1]
        if int(numbers.max()) < 3:
            return {}
        for parity in (0, 1):
            part = numbers % 2 == parity
            points = [None if point is None else rows(point, part) for point in (before, after, planned)]
            assert points[0] is not None and points[1] is not None
            changes = step_changes(points[0], points[1], points[2])
            halves.append({name: change.estimate(prompts[part]) for name, change in changes.items()})
        for name, predicted in halves[0].items():
            self.agreement.add_pair(f"cross_{name}", predicted, halves[1]["measured"])
        logged: dict[str, float] = {}
        for label, half in zip("ab", halves, strict=True):
            for name, estimate in half.items():
                logged |= with_stderr(f"{self.name}/half_{label}_{name}", estimate)
            logged[f"{self.name}/half_{label}_num_prompts"] = half["measured"].dof + 1
        return logged


class QuantityChanges:
    """The same of every number of the completions (T21): reward, length, metrics; one [`StepChanges`] for each."""

    def __init__(self, every_step: bool) -> None:
        self.every_step, self._changes = every_step, dict[str, StepChanges]()

    def add(
        self,
        values: dict[str, Float[Tensor, " B"]],
        log_weights: tuple[Float[Tensor, "B before"], Float[Tensor, "B after"]],
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
        for key, column in values.items():
            before, after = (expectation_terms(column, weights, prompts) for weights in log_weights)
            one = self._changes.setdefault(key, StepChanges(key, self.every_step))
            logged |= one.add(before, after, prompts) | one.agreement.metrics()
        return logged

    def state_dict(self) -> StateDict:
        return {key: one.agreement.state_dict() for key, one in self._changes.items()}

    def load_state_dict(self, state: StateDict) -> None:
        self._changes = {key: StepChanges(key, self.every_step) for key in state}
        for key, one in self._changes.items():
            one.agreement.load_state_dict(state[key])
