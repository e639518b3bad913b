"""The change of the policy's entropy by one optimizer step: measured on a probe batch, and predicted."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from torch import Tensor, nn

from trl_entropy.config.dr_grpo import DrGRPOConfig
from trl_entropy.engine import Engine, UpdateContext, rank_symmetric
from trl_entropy.engine.adamw_step import predicted_update
from trl_entropy.estimators.entropy_change.delta_entropy import RatioTerms, delta_linear, entropy_terms, policy_entropy
from trl_entropy.estimators.entropy_change.rivals import (
    CovarianceTerms,
    delta_covariance,
    natural_gradient_terms,
    policy_gradient_terms,
)
from trl_entropy.estimators.entropy_change.step_change import (
    PointTerms,
    importance_sample_size,
    point_terms,
    rows,
    stacked,
    step_changes,
    unstacked,
)
from trl_entropy.estimators.statistics.estimate import Linearization
from trl_entropy.estimators.statistics.importance import effective_sample_size, importance_weights
from trl_entropy.gradients.scores import Params, TokenScores, score
from trl_entropy.probes import model_checks
from trl_entropy.probes.agreement import RunningAgreement
from trl_entropy.probes.attribution import ProbeBatch, StepAttribution
from trl_entropy.probes.files import ProbeFiles
from trl_entropy.probes.logged import changes_logged, with_stderr
from trl_entropy.probes.probe import Probe
from trl_entropy.probes.rollout_entropy import RolloutEntropyProbe
from trl_entropy.probes.step_record import StepRecord
from trl_entropy.rollouts.completions import Completions
from trl_entropy.runs.state import StateDict

_NOISE_FLOOR_EVERY = 10  # the rounding noise hardly changes, so it is measured on every tenth probed step
_RIVALS = {"cov_natural": natural_gradient_terms, "cov_policy_gradient": policy_gradient_terms}


class EntropyProbe(Probe):
    """
    Entropy change of a step on a probe batch E, completions that are independent of those of the step: measured (T7);
    predicted to first order (T8), to second order (T10) and by the trapezoidal rule (T10), each with its standard
    error; and, for comparison, the predictions of covariance formulas (T11).

    E is drawn before the step, and scored after it twice: with the parameters from before and from after the step in
    the model. Forward-mode differentiation along the true update gives the derivative of each token's score, so every
    optimizer and every loss is covered.

    With dropout everything but (T11) is about the policy without it: E is drawn and scored in evaluation mode, and the
    update is the one that training made. The covariances are of training's own passes.

    Args:
        every: cadence in steps.
        num_prompts: prompts in E over all processes, one completion each.
        batch_size: completions scored at a time; halved on out-of-memory.
        second_order: predict to second order *before* the step, along the update that AdamW's equation (T4) gives.
        placebo: a control: also predict this step's change from an earlier step's update.
        attribution: split the first-order change (T9) into momentum, weight decay and each completion (`"sequence"`)
            or each token (`"token"`); `"none"`: do not split it.
        source: `"held_out"` (training prompts that are not in this step) or `"eval"` (`eval_dataset`).
        sampler: `"model"` (the model's own `generate`) or `"vllm"`, corrected by vLLM's log-probabilities (T6).
        draw: called as `(step, rank) -> Completions` in place of sampling from the policy; must return equally many
            rows on every rank.
    """

    name = "entropy"

    def __init__(
        self,
        every: int = 1,
        num_prompts: int = 64,
        batch_size: int = 64,
        second_order: bool = False,
        placebo: bool = False,
        source: str = "held_out",
        sampler: str = "model",
        draw: Callable[[int, int], Completions] | None = None,
        attribution: str = "none",
    ) -> None:
        super().__init__(every)
        self.num_prompts, self.batch_size, self.source = num_prompts, batch_size, source
        self.second_order, self.placebo, self.sampler, self.draw = second_order, placebo, sampler, draw
        self.attribution = None if attribution == "none" else StepAttribution(attribution, batch_size)
        self.agreement = RunningAgreement()
        self._num_probed = 0
        self._rivals: dict[str, list[Tensor]] = {name: [] for name in _RIVALS}
        self._earlier_update: dict[str, Tensor] | None = None

    @classmethod
    def from_config(cls, args: DrGRPOConfig) -> Probe:
        if args.entropy_probe_completions == "rollouts":
            return RolloutEntropyProbe.from_config(args)
        return cls(
            every=args.entropy_probe_every,
            num_prompts=args.entropy_probe_num_completions,
            batch_size=args.probe_batch_size,
            second_order=args.entropy_second_order,
            placebo=args.entropy_placebo,
            source=args.entropy_probe_completions,
            sampler=args.entropy_probe_sampler,
            attribution=args.entropy_attribution,
        )

    # ---- before training

    @property
    def needs_loss_coefficients(self) -> bool:
        return self.attribution is not None

    def check_model(self, args: DrGRPOConfig, model: nn.Module) -> None:
        if self.draw is None and self.sampler == "model":
            model_checks.check_full_distribution(args, model, "entropy_probe", draws=True)
        model_checks.check_scoring(model, "entropy_probe", derivatives=True)
        model_checks.check_derivatives(model, "entropy_probe")
        if self.attribution is not None:
            self.attribution.check(args, model)

    def reset(self) -> None:
        for parts in self._rivals.values():
            parts.clear()

    # ---- events

    def on_micro_batch(self, args, state, control, *, metrics, inputs, per_token_logps, mask, **kwargs: Any) -> None:
        for name, terms in _RIVALS.items():
            self._rivals[name].append(torch.stack(terms(per_token_logps, inputs["advantages"], mask), dim=1))

    def on_before_update(self, args, state, control, *, metrics, update, engine, sampler, **kwargs: Any) -> None:
        step, rank, start = state.global_step + 1, engine.accelerator.process_index, time.perf_counter()
        draw = self.draw or (lambda step, _: sampler.draw(self.num_prompts, self.source, step, self.sampler))
        self._completions = draw(step, rank)
        metrics["time/entropy_draw"] = time.perf_counter() - start
        params = update.params_before
        self._second_order: PointTerms | None = None
        if self.second_order:
            scores = self._score(engine, args, params, predicted_update(update), order=2)
            self._second_order = self._terms(scores, scores, engine.accelerator)
        if self.attribution is not None:
            self.attribution.before_update(update)

    def on_after_update(self, args, state, control, *, metrics, update, engine, record, files, **kwargs: Any) -> None:
        before = self._score(engine, args, update.params_before, update.update)
        after = self._score(engine, args, update.params_after, update.update)
        metrics |= self._changes(before, after, engine.accelerator)
        metrics |= self._rival_changes(engine.accelerator)
        if self.attribution is not None:
            probe = self._batch_before(before, metrics["entropy/delta_linear"], engine.accelerator)
            metrics |= self.attribution.after_update(args, update, engine, record, probe, files)
        if self._num_probed % _NOISE_FLOOR_EVERY == 0:
            metrics |= self._noise_floor(before, args, update, engine)
        if computes_below_float32(engine):
            metrics |= self._model_change(args, update, engine)
        if self.placebo:
            metrics |= self._placebo(before, args, update, engine)
        metrics |= self.agreement.metrics()
        self._num_probed += 1
        self._write(files, record, before, after, engine.accelerator)

    # ---- resuming

    def state_dict(self) -> StateDict:
        return {
            "agreement": self.agreement.state_dict(),
            "num_probed": self._num_probed,
            "earlier_update": self._earlier_update,
            "attribution": self.attribution and self.attribution.state_dict(),
        }

    def load_state_dict(self, state: StateDict) -> None:
        self.agreement.load_state_dict(state["agreement"])
        self._num_probed, self._earlier_update = state["num_probed"], state["earlier_update"]
        if self.attribution is not None and state.get("attribution"):  # a checkpoint has none if it was off then
            self.attribution.load_state_dict(state["attribution"])

    # ---- measuring

    def _score(
        self,
        engine: Engine,
        args: DrGRPOConfig,
        params: Params,
        direction: Params | None,
        order: int = 1,
        batch_size: int | None = None,
    ) -> TokenScores:
        """Score E in float32 with `params` in the model: each rank its own rows; if one rank fails, all do."""
        with (
            rank_symmetric(engine.accelerator, "scoring the entropy probe's completions"),
            engine.scoring_model(params) as model,
        ):
            size = batch_size or self.batch_size
            return score(model, self._completions, args.temperature, size, params, direction, order)

    def _terms(
        self, scores: TokenScores, drawn_by: TokenScores, accelerator: Accelerator, form: Any = "decision"
    ) -> PointTerms:
        """The entropy terms of each completion of all ranks, in rank order. Collective."""
        mask = self._completions.completion_mask
        terms = point_terms(scores.entropy, scores.logps, self._sampling_logps(drawn_by), mask, form)
        return unstacked(accelerator.gather(stacked(terms)))

    def _sampling_logps(self, policy: TokenScores) -> Tensor:
        """
        Log-probabilities of E under what drew it: the sampler's own if it returned any, else the policy's, also of a
        token for which the sampler returned none: its weight is 1, as in TRL's loss.
        """
        own = self._completions.sampling_logps
        return policy.logps[0] if own is None else own.where(~own.isnan(), policy.logps[0])

    def _sampler_weights(self, policy: TokenScores) -> Tensor:
        """Mean importance weight over the tokens of each completion, when vLLM drew it."""
        mask = self._completions.completion_mask
        weights = importance_weights(policy.logps[0], self._sampling_logps(policy), mask)
        return weights.where(mask.bool(), 0.0).sum(1) / mask.sum(1)

    def _changes(self, before: TokenScores, after: TokenScores, accelerator: Accelerator) -> dict[str, float]:
        """The metrics of the step's entropy change on E; adds its pairs to the running agreement. Collective."""
        prompts = accelerator.gather(self._completions.prompt_index)
        points = self._terms(before, before, accelerator), self._terms(after, before, accelerator)
        changes = step_changes(*points, self._second_order)
        logged = changes_logged(changes, prompts)
        logged |= with_stderr("entropy/probe_batch", policy_entropy(points[0].terms).estimate(prompts))
        logged["entropy/importance_ess"] = importance_sample_size(*points)
        if self._completions.sampling_logps is not None:
            mean_weights = accelerator.gather(self._sampler_weights(before))
            logged["entropy/sampler_ess"] = effective_sample_size(mean_weights).item()
        logged |= {"entropy/num_completions": len(prompts), "entropy/num_prompts": len(prompts.unique())}
        sequence = step_changes(
            self._terms(before, before, accelerator, "sequence"), self._terms(after, before, accelerator, "sequence")
        )
        for name in ("measured", "linear"):
            logged |= with_stderr(f"entropy/delta_{name}_sequence", sequence[name].estimate(prompts))
        self._measured = changes["measured"].estimate(prompts)
        self._add_to_agreement(changes, points, prompts)
        return logged | self._halves(points, prompts)

    def _add_to_agreement(
        self, changes: dict[str, Linearization], points: tuple[PointTerms, PointTerms], prompts: Tensor
    ) -> None:
        """Add the pairs on the same completions, and the changes to the integrals."""
        start = policy_entropy(points[0].terms).value.item()
        for name, change in changes.items():
            if self.every == 1:
                self.agreement.add_change(name, start, change.value.item())
            if name != "measured":
                difference = (change - changes["measured"]).estimate(prompts)
                self.agreement.add_pair(f"same_sample_{name}", change.estimate(prompts), self._measured, difference)

    def _halves(self, points: tuple[PointTerms, PointTerms], prompts: Tensor) -> dict[str, float]:
        """
        Predict on the half of E with even prompts and measure on the other half: unlike on the same completions, the
        two share no sampling error, so that their agreement is a test of the prediction.
        """
        halves = []
        for parity in (0, 1):
            part = prompts % 2 == parity
            second = None if self._second_order is None else rows(self._second_order, part)
            before, after = (rows(point, part) for point in points)
            changes = step_changes(before, after, second)
            halves.append({name: change.estimate(prompts[part]) for name, change in changes.items()})
        for name, predicted in halves[0].items():
            self.agreement.add_pair(f"cross_{name}", predicted, halves[1]["measured"])
        logged: dict[str, float] = {}
        for label, half in zip("ab", halves, strict=True):
            for name, estimate in half.items():
                logged |= with_stderr(f"entropy/half_{label}_{name}", estimate)
            logged[f"entropy/half_{label}_num_prompts"] = half["measured"].dof + 1
        return logged

    def _rival_changes(self, accelerator: Accelerator) -> dict[str, float]:
        logged = {}
        for name, parts in self._rivals.items():
            columns = accelerator.gather(torch.cat(parts)).unbind(1)
            logged[f"entropy/delta_{name}"] = delta_covariance(CovarianceTerms(*columns)).value.item()
            parts.clear()
        return logged

    def _batch_before(self, before: TokenScores, delta_linear: float, accelerator: Accelerator) -> ProbeBatch:
        """E before the step, as the attribution needs it. Collective."""
        batch = self._completions
        weights = importance_weights(before.logps[0], self._sampling_logps(before), batch.completion_mask)
        return ProbeBatch(batch, weights, self._terms(before, before, accelerator).terms, delta_linear)

    def _noise_floor(
        self, before: TokenScores, args: DrGRPOConfig, update: UpdateContext, engine: Engine
    ) -> dict[str, float]:
        """How much the entropy changes by rounding alone: same parameters, scored in batches of another size."""
        again = self._score(
            engine, args, update.params_before, None, order=0, batch_size=max(1, self.batch_size // 2 - 1)
        )
        accelerator = engine.accelerator
        values = [self._entropy(scores, before, accelerator) for scores in (before, again)]
        return {"entropy/noise_floor": abs(values[0] - values[1])}

    def _entropy(self, scores: TokenScores, drawn_by: TokenScores, accelerator: Accelerator) -> float:
        """The entropy (T6) on E, nats per token. Collective."""
        mask = self._completions.completion_mask
        weights = importance_weights(scores.logps[0], self._sampling_logps(drawn_by), mask)
        terms = entropy_terms(scores.entropy[0], weights, mask)
        return policy_entropy(RatioTerms(*accelerator.gather(torch.stack(terms, dim=1)).unbind(1))).value.item()

    def _model_change(self, args: DrGRPOConfig, update: UpdateContext, engine: Engine) -> dict[str, float]:
        """The same change in the precision that training computes in: mostly rounding at small learning rates."""
        values, drawn_by = [], None
        for params in (update.params_before, update.params_after):
            with (
                rank_symmetric(engine.accelerator, "scoring with the training precision"),
                engine.scoring_model(params, dtype=None) as model,
            ):
                scores = score(model, self._completions, args.temperature, self.batch_size)
            drawn_by = drawn_by or scores
            values.append(self._entropy(scores, drawn_by, engine.accelerator))
        return {"entropy/delta_measured_model": values[1] - values[0]}

    def _placebo(
        self, before: TokenScores, args: DrGRPOConfig, update: UpdateContext, engine: Engine
    ) -> dict[str, float]:
        """
        Predict this step's change from an earlier update. The n-th probed step's update replaces the one that is kept
        with probability 1/n, so that each earlier update is kept with the same probability.
        """
        logged: dict[str, float] = {}
        if self._earlier_update is not None:
            # A resumed run has it on the CPU, from the checkpoint.
            direction = send_to_device(self._earlier_update, engine.accelerator.device)
            scores = self._score(engine, args, update.params_before, direction)
            terms = self._terms(scores, before, engine.accelerator)
            prompts = engine.accelerator.gather(self._completions.prompt_index)
            predicted = delta_linear(terms.terms, terms.tangents).estimate(prompts)
            self.agreement.add_pair("placebo", predicted, self._measured)
            logged = with_stderr("entropy/delta_placebo", predicted)
        if random.Random(self._num_probed).random() < 1 / (self._num_probed + 1):
            self._earlier_update = {name: value.clone() for name, value in update.update.items()}
        return logged

    def _write(
        self, files: ProbeFiles, record: StepRecord, before: TokenScores, after: TokenScores, accelerator: Accelerator
    ) -> None:
        """
        Write `probes/entropy/step_*.safetensors`; with it and the checkpoints of steps s - 1 and s every number of
        step s can be recomputed.
        """
        tensors = self._completions.tensors()
        tensors |= {"logps_before": before.logps[0], "logps_after": after.logps[0]}
        tensors |= {"entropy_before": before.entropy[0], "entropy_after": after.entropy[0]}
        files.write(self.name, record.step, tensors, distribution="all prompts")
        files.write_rollouts(record.step, record.rollouts)


def computes_below_float32(engine: Engine) -> bool:
    """Whether training computes below float32: under autocast, or with parameters of a narrower dtype."""
    narrow = any(param.is_floating_point() and param.itemsize < 4 for param in engine.module.parameters())
    return narrow or engine.accelerator.mixed_precision != "no"
