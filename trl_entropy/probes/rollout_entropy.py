"""The entropy change of a step, predicted from its gradient and measured, on the step's own completions."""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from jaxtyping import Bool, Float
from torch import Tensor, nn

from trl_entropy.config.probe_checks import ProbeChecks
from trl_entropy.config.quantities import values_asked_for
from trl_entropy.engine import Engine, UpdateContext, num_trainable, rank_symmetric
from trl_entropy.engine.optimizer_step import has_metric_before, metric_before
from trl_entropy.estimators.entropy_change.cross_prompt import (
    accepted_gram,
    cross_prompt_change,
    relative_gradient_error,
)
from trl_entropy.estimators.entropy_change.delta_entropy import (
    RatioTerms,
    delta_measured,
    entropy_terms,
    policy_entropy,
)
from trl_entropy.estimators.entropy_change.expectation import expectation_terms, log_weight_sums
from trl_entropy.estimators.entropy_change.step_estimates import step_estimates
from trl_entropy.estimators.statistics.importance import effective_sample_size, importance_weights
from trl_entropy.estimators.statistics.u_statistic import cross_gram
from trl_entropy.gradients.group_gradients import GroupRows, flat, gram_of_all_rows, group_rows
from trl_entropy.gradients.loss_coefficients import LossCoefficients
from trl_entropy.gradients.memory import GIB, rows_budget_of
from trl_entropy.gradients.scores import Params, TokenScores, score
from trl_entropy.probes import model_checks
from trl_entropy.probes.files import ProbeFiles
from trl_entropy.probes.logged import with_stderr
from trl_entropy.probes.probe import Probe
from trl_entropy.probes.router_flips import router_flips
from trl_entropy.probes.step_record import StepRecord
from trl_entropy.rollouts.batch import RolloutBatch
from trl_entropy.rollouts.completions import Completions

logger = logging.getLogger(__name__)

# Fewer groups of a process than this have too few pairs to be measured.
_LEAST_GROUPS = 2


class Accepted(NamedTuple):
    """Which groups and which completions of all ranks are measured, and which completions of this rank."""

    of_groups: Bool[Tensor, " P"]
    of_rows: Bool[Tensor, " N"]
    here: Bool[Tensor, " B"]


class RolloutEntropyProbe(Probe):
    """
    Entropy change of a step on its own completions (the rollouts U), without generating any others:
    `entropy_probe_completions="rollouts"`.

    Before the update, (T17) predicts what this step's gradient does to the entropy to first order, from pairs of
    *different* prompts (`entropy/delta_cross_prompt`) and, for comparison, including each group's effect on itself
    (`entropy/delta_same_sample`). M is the optimizer's metric before the step, so that of most the first step has
    neither. After the update, (T7) is measured on U (`entropy/delta_in_sample`): it contains each completion's effect
    on itself, momentum and weight decay, and must not be compared with (T17).

    With `resample_uninformative_groups` everything is about the accepted groups: the entropy is theirs and pairs are
    formed of them alone (T14a); groups that had to be kept with equal rewards only count in the step's number of
    prompts P. Without it, everything is about all prompts.

    Needs an on-policy step of an optimizer with a known metric, and any loss whose dependence on the scores the
    backward pass of training shows: KL term, entropy bonus and vLLM's importance factor are in it.
    `DrGRPOConfig.check_rollouts_source` lists what is refused. Gradients are those of the float32 model, and dropout
    is refused; `entropy/rollouts_gradient_error` is the relative difference of their sum from the gradient that the
    optimizer got. A loss divided by a number of tokens and `scale_rewards="batch"` make the groups dependent by
    O(1/P).
    Cost: three forward and two backward passes of U. Memory: two float32 vectors of all trainable parameters for each
    prompt group of this process. Where `probe_rows_gib` does not suffice for all, pairs are formed of the first groups
    of each process for which it does, as good as any others: `entropy/delta_cross_prompt` keeps its expectation, and
    its standard error grows as that of a step with so many prompts.

    Args:
        every: cadence in steps.
        batch_size: completions scored at a time, and at most as many of one group differentiated at a time; None: as
            many as memory allows.
        change_of: whose change in sample is measured beside the entropy's, see the setting; None: the reward's.
    """

    name = "entropy"
    needs_loss_coefficients = True
    splits_steps = True
    measures_quantities = True

    def __init__(self, every: int = 1, batch_size: int | None = None, change_of: Sequence[str] | None = None) -> None:
        super().__init__(every)
        self.batch_size, self.change_of = batch_size, change_of
        self._said_undefined = False

    @classmethod
    def from_config(cls, args: ProbeChecks) -> RolloutEntropyProbe:
        return cls(every=args.entropy_probe_every, batch_size=args.probe_batch_size, change_of=args.change_of)

    # ---- before training

    def check_model(self, args: ProbeChecks, model: nn.Module) -> None:
        what = "entropy_probe_completions='rollouts'"
        args.check_rollouts_source()
        model_checks.check_full_distribution(args, model, what)
        model_checks.check_own_completions(model, what)
        model_checks.check_scoring(model, what)
        model_checks.check_derivatives(model, what)
        model_checks.check_no_dropout(model, what)
        model_checks.check_no_auxiliary_loss(args, model, what)
        num_rows = args.per_device_train_batch_size * args.gradient_accumulation_steps
        self._num_kept = groups_that_fit(
            num_rows // args.num_generations, args.world_size, model, rows_budget_of(args, model)
        )

    # ---- events

    def on_before_update(
        self, args, state, control, *, metrics, update: UpdateContext, engine, rollouts, record, **kwargs: Any
    ) -> None:
        has_metric = has_metric_before(update)
        accelerator = engine.accelerator
        self._completions = Completions.of(rollouts)
        self._accepted = accepted_of(args, rollouts, accelerator)
        self._before = self._score(engine, args, update.params_before)
        self._terms = self._entropy_terms(self._before, accelerator)
        prompts = accelerator.gather(self._completions.prompt_index)
        self._prompts = prompts[self._accepted.of_rows]
        entropy = policy_entropy(self._terms).estimate(self._prompts)
        metrics |= {"entropy/probe_batch": entropy.value, "entropy/probe_batch_stderr": entropy.stderr}
        metrics |= {"entropy/num_completions": entropy.num_samples, "entropy/num_prompts": entropy.dof + 1}
        if has_metric:
            metrics |= self._predicted_changes(args, update, engine, record.loss_coefficients, entropy.value)
        elif not self._said_undefined and state.is_world_process_zero:
            self._said_undefined = True
            logger.warning(
                "step %d is the optimizer's first: it has seen no gradient to have a metric of, so "
                "entropy/delta_cross_prompt (T17) begins with the next step.",
                state.global_step + 1,
            )

    def on_after_update(
        self, args, state, control, *, metrics, update: UpdateContext, engine, record, files, **kwargs: Any
    ) -> None:
        after = self._score(engine, args, update.params_after)
        terms = self._entropy_terms(after, engine.accelerator)
        change = delta_measured(self._terms, terms).estimate(self._prompts)
        metrics |= {"entropy/delta_in_sample": change.value, "entropy/delta_in_sample_stderr": change.stderr}
        metrics |= self._quantities_in_sample(after, engine.accelerator)
        mean_weights = terms.denominator / self._terms.denominator
        metrics["entropy/importance_ess"] = effective_sample_size(mean_weights).item()
        mask = self._completions.loss_mask.bool()
        metrics |= router_flips(self._before.experts, after.experts, mask, engine.accelerator)
        self._write(args, files, record, after)

    # ---- measuring

    def _score(self, engine: Engine, args: ProbeChecks, params: Params) -> TokenScores:
        """Score U in float32 with `params` in the model: each rank its own rows; if one rank fails, all do."""
        with (
            rank_symmetric(engine.accelerator, "scoring the step's completions"),
            engine.scoring_model(params, differentiated=False) as model,
        ):
            return score(model, self._completions, args.temperature, self.batch_size, params)

    def _entropy_terms(self, scores: TokenScores, accelerator: Accelerator) -> RatioTerms:
        """The entropy terms (T6) of the accepted completions of all ranks, in rank order. Collective."""
        terms = torch.stack(
            entropy_terms(scores.entropy[0], self._weights(scores), self._completions.loss_mask), dim=1
        )
        return RatioTerms(*accelerator.gather(terms)[self._accepted.of_rows].unbind(1))

    def _weights(self, scores: TokenScores) -> Float[Tensor, "B T"]:
        """Importance weights (T6) of the policy that `scores` are of."""
        drawn = self._completions.drawn_with(self._before.logps[0])
        return importance_weights(scores.logps[0], drawn, self._completions.loss_mask)

    def _quantities_in_sample(self, after: TokenScores, accelerator: Accelerator) -> dict[str, float]:
        """The change (T21) of the accepted completions' numbers, each one's effect on itself included. Collective."""
        values, mask = values_asked_for(self._completions.values, self.change_of), self._completions.loss_mask
        if not values:
            return {}
        drawn = self._completions.drawn_with(self._before.logps[0])
        sums = [log_weight_sums((scores.logps[0],), drawn, mask) for scores in (self._before, after)]
        columns = accelerator.gather(torch.cat([*sums, torch.stack(list(values.values()), dim=1)], dim=1))
        columns, prompts = columns[self._accepted.of_rows].cpu(), self._prompts.cpu()
        start, end = (expectation_terms(columns[:, 2:], columns[:, [at]], prompts) for at in (0, 1))
        logged: dict[str, float] = {}
        for key, found in zip(values, step_estimates(start, end, prompts), strict=True):
            logged |= with_stderr(f"{key}/delta_in_sample", found.changes["measured"])
        return logged

    def _predicted_changes(
        self,
        args: ProbeChecks,
        update: UpdateContext,
        engine: Engine,
        coefficients: LossCoefficients,
        entropy: float,
    ) -> dict[str, float]:
        """The prediction (T17), from the groups of all ranks. Collective."""
        accelerator = engine.accelerator
        accepted = self._accepted.of_groups
        num_prompts, num_accepted = len(accepted), int(accepted.sum())
        rows = self._group_rows(
            args, engine, update.params_before, coefficients.times(num_prompts), entropy, num_accepted
        )
        names = list(engine.parameters)
        metric = flat(metric_before(update), names)
        product = functools.partial(cross_gram, preconditioner=metric)
        gram = gram_of_all_rows(rows.entropy, rows.loss, accelerator, product)
        kept = accepted.view(accelerator.num_processes, -1)[:, : len(rows.loss)].flatten()
        change = cross_prompt_change(accepted_gram(gram, kept, num_accepted / num_prompts))
        row_sum, gradient = accelerator.reduce(rows.loss_total), flat(update.gradient, names)
        return {
            "entropy/delta_cross_prompt_num_prompts": int(kept.sum()),
            "entropy/delta_cross_prompt": change.cross_prompt.value,
            "entropy/delta_cross_prompt_stderr": change.cross_prompt.stderr,
            "entropy/delta_cross_prompt_stderr_unbiased": change.stderr_unbiased,
            "entropy/delta_same_sample": change.same_sample,
            "entropy/rollouts_gradient_error": relative_gradient_error(row_sum, num_prompts, gradient).item(),
            "entropy/num_coordinates_without_metric": int((metric == 0).sum()),
        }

    def _group_rows(
        self,
        args: ProbeChecks,
        engine: Engine,
        params: Params,
        coefficients: LossCoefficients,
        entropy: float,
        num_prompts: int,
    ) -> GroupRows:
        """
        X_n and Y_n, the gradients of the entropy and of the loss, of this rank's groups; if one rank fails, all do.
        """
        num_tokens = self._terms.denominator.sum().item()
        batch_size = min(self.batch_size or args.num_generations, args.num_generations)
        weights = None if self._completions.sampling_logps is None else self._weights(self._before)
        with (
            rank_symmetric(engine.accelerator, "differentiating the step's prompt groups"),
            engine.scoring_model(params) as model,
        ):
            return group_rows(
                model,
                self._completions,
                coefficients,
                args.temperature,
                entropy,
                num_tokens,
                num_prompts,
                batch_size,
                weights,
                self._num_kept,
            )

    def _write(self, args: ProbeChecks, files: ProbeFiles, record: StepRecord, after: TokenScores) -> None:
        """Write `probes/entropy/step_*.safetensors` as `EntropyProbe` does, here with the step's own completions."""
        tensors = self._completions.tensors()
        tensors |= {"logps_before": self._before.logps[0], "logps_after": after.logps[0]}
        tensors |= {"entropy_before": self._before.entropy[0], "entropy_after": after.entropy[0]}
        if args.resample_uninformative_groups:
            tensors["accepted"] = self._accepted.here
        files.write(self.name, record.step, tensors)


def accepted_of(args: ProbeChecks, rollouts: RolloutBatch, accelerator: Accelerator) -> Accepted:
    """All groups or, if groups with equal rewards were replaced, those with different rewards. Collective."""
    prompts, numbers = rollouts.prompt_index.unique(return_inverse=True)
    groups = rollouts.accepted if args.resample_uninformative_groups else torch.ones_like(prompts, dtype=torch.bool)
    return Accepted(accelerator.gather(groups), accelerator.gather(groups[numbers]), groups[numbers])


def groups_that_fit(num_groups: int, world_size: int, model: nn.Module, budget: float) -> int:
    """
    How many of one process's prompt groups have their gradients X_n and Y_n kept; a process also receives the Y_n of
    another, one after the other.

    Raises:
        ValueError: if `budget` bytes are too few for two groups, of which there must be pairs.
    """
    num_parameters = num_trainable(model)
    each = 4 * num_parameters * (3 if world_size > 1 else 2)
    fitting = min(num_groups, int(budget // each))
    if fitting < min(num_groups, _LEAST_GROUPS):
        raise ValueError(
            f"entropy_probe_completions='rollouts' keeps two float32 gradients for each of at least {_LEAST_GROUPS} "
            f"of a process's {num_groups} prompt groups of a step: {_LEAST_GROUPS * each / GIB:.1f} GiB for "
            f"{num_parameters} trainable parameters, the limit is {budget / GIB:.1f} GiB. Use LoRA, a larger "
            "probe_rows_gib, or entropy_probe_completions='held_out'."
        )
    return fitting
