"""The change of the policy's entropy by one optimizer step on given completions: measured, predicted, attributed."""

from __future__ import annotations

import functools
import random
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from torch import Tensor, nn

from trl_entropy.config.probe_checks import ProbeChecks
from trl_entropy.config.quantities import values_asked_for
from trl_entropy.engine import Engine, PastUpdate, rank_symmetric
from trl_entropy.estimators.entropy_change.delta_entropy import RatioTerms, delta_linear, entropy_terms, policy_entropy
from trl_entropy.estimators.entropy_change.expectation import log_weight_sums, slope_coefficients
from trl_entropy.estimators.entropy_change.step_change import (
    PointTerms,
    importance_sample_size,
    point_terms,
    stacked,
    step_changes,
    unstacked,
)
from trl_entropy.estimators.statistics.estimate import Linearization
from trl_entropy.estimators.statistics.importance import effective_sample_size, importance_weights
from trl_entropy.gradients.memory import rows_at_once
from trl_entropy.gradients.scores import Params, TokenScores, score
from trl_entropy.probes import model_checks
from trl_entropy.probes.agreement import metrics_of_all
from trl_entropy.probes.attribution import ProbeBatch, RewardSlope, StepAttribution
from trl_entropy.probes.covariances import Covariances
from trl_entropy.probes.files import ProbeFiles
from trl_entropy.probes.logged import with_stderr
from trl_entropy.probes.precision import DerivativePrecision, computes_below_float32
from trl_entropy.probes.probe import Probe
from trl_entropy.probes.router_flips import router_flips
from trl_entropy.probes.step_changes import QuantityChanges, StepChanges, gathered_on_host
from trl_entropy.probes.step_record import ScoredCompletions, StepRecord
from trl_entropy.rollouts.completions import Completions
from trl_entropy.runs.state import StateDict

_NOISE_FLOOR_EVERY = 10  # the rounding noise hardly changes, so it is measured on every tenth probed step
# Derivatives along the update that each prediction takes: before the step, and after it.
_ORDERS = {"none": (0, 0), "linear": (1, 0), "trapezoid": (1, 1)}


class Ends(NamedTuple):
    """Scores of E with the parameters from before and from after the step, and which of the two policies drew E."""

    before: TokenScores
    after: TokenScores
    drawn_by: TokenScores


class EntropyChangeProbe(Probe):
    """
    Entropy change of a step on a probe batch E, completions that are independent of those of the step: measured (T7);
    predicted to first order (T8), to second order (T10) and by the trapezoidal rule (T10), each with its standard
    error; and, for comparison, the predictions of covariance formulas (T11). A subclass says where E comes from.

    E is scored with the parameters from before and from after the step in the model. Forward-mode differentiation
    along the true update gives the derivative of each token's score, so every optimizer and every loss is covered.

    Args:
        every: cadence in steps.
        batch_size: completions scored at a time, at most; None: as many as memory allows.
        prediction: `"trapezoid"` (and first order), `"linear"` (first order alone) or `"none"`.
        placebo: a control: also predict this step's change from an earlier step's update.
        attribution: split the first-order change (T9) into momentum, weight decay and each completion (`"sequence"`)
            or each token (`"token"`); `"none"`: do not split it.
        precision: of derivatives, see [`DerivativePrecision`]: `"auto"`, `"float32"` or `"tf32"`.
        reward_attribution: with `attribution`, split the change of the expected reward too (T22).
        change_of: whose change is measured beside the entropy's, see the setting; None: the reward's.
    """

    name = "entropy"
    measures_quantities = True

    def __init__(
        self,
        every: int,
        batch_size: int | None,
        prediction: str = "trapezoid",
        placebo: bool = False,
        attribution: str = "none",
        precision: str = "auto",
        change_of: Sequence[str] | None = None,
        reward_attribution: bool = False,
    ) -> None:
        super().__init__(every)
        if prediction not in _ORDERS:
            raise ValueError(f"prediction is {prediction!r}; use one of {', '.join(_ORDERS)}.")
        self.batch_size, self.prediction, self.placebo = batch_size, prediction, placebo
        self.precision = DerivativePrecision(precision)
        self.attribution = None
        if attribution != "none":
            self.attribution = StepAttribution(attribution, batch_size, self.precision, reward_attribution)
        self.change_of = change_of
        self.entropy, self.quantities = StepChanges("entropy", every == 1), QuantityChanges(every == 1)
        self._num_probed = 0
        self._covariances = Covariances()
        self._earlier_update: dict[str, Tensor] | None = None
        self._second_order: PointTerms | None = None
        self._reward_coefficients: Tensor | None = None

    @staticmethod
    def shared_settings(args: ProbeChecks) -> dict[str, Any]:
        """What the settings of a run say of the arguments that all sources of completions have."""
        return {
            "every": args.entropy_probe_every,
            "batch_size": args.probe_batch_size,
            "placebo": args.entropy_placebo,
            "attribution": args.entropy_attribution,
            "prediction": args.entropy_prediction,
            "precision": args.probe_precision,
            "change_of": args.change_of,
            "reward_attribution": args.reward_attribution,
        }

    # ---- before training

    @property
    def needs_loss_coefficients(self) -> bool:
        return self.attribution is not None

    splits_steps = property(lambda self: self.attribution is not None)

    def check_model(self, args: ProbeChecks, model: nn.Module) -> None:
        model_checks.check_scoring(model, "entropy_probe", derivatives=self.prediction != "none")
        model_checks.check_derivatives(model, "entropy_probe")
        if args.process_index == 0:
            self.precision.warn_if_without_effect(args.device)
        if self.attribution is not None:
            self.attribution.check(args, model)

    def reset(self) -> None:
        self._covariances.clear()

    # ---- events

    def on_micro_batch(self, args, state, control, *, metrics, inputs, per_token_logps, mask, **kwargs: Any) -> None:
        self._covariances.add(per_token_logps, inputs["advantages"], mask)

    # ---- resuming

    def state_dict(self) -> StateDict:
        return {
            "agreement": self.entropy.agreement.state_dict(),
            "quantities": self.quantities.state_dict(),
            "num_probed": self._num_probed,
            "earlier_update": self._earlier_update,
            "attribution": self.attribution and self.attribution.state_dict(),
            "precision": self.precision.chosen,
        }

    def load_state_dict(self, state: StateDict) -> None:
        self.entropy.agreement.load_state_dict(state["agreement"])
        self.quantities.load_state_dict(state.get("quantities", {}))  # a checkpoint of an earlier version has none
        self._num_probed, self._earlier_update = state["num_probed"], state["earlier_update"]
        self.precision.chosen = state.get("precision")  # a checkpoint of an earlier version has none
        if self.attribution is not None and state.get("attribution"):  # a checkpoint has none if it was off then
            self.attribution.load_state_dict(state["attribution"])

    # ---- measuring

    def measure(
        self,
        args: ProbeChecks,
        past: PastUpdate,
        record: StepRecord,
        completions: Completions,
        engine: Engine,
        files: ProbeFiles,
        drawn_after: bool = False,
        distribution: str = "all prompts",
    ) -> dict[str, float]:
        """
        The metrics of a step that has been made, on completions that are independent of it; writes the probe's files.
        Collective.

        Args:
            completions: E; equally many rows on every rank.
            drawn_after: whether the policy after the step drew E, and not the one before it. Weights (T6) are those of
                `completions.sampling_logps` if it has them.
            distribution: which prompts E has, for its file.
        """
        self._completions = completions
        orders, metrics = _ORDERS[self.prediction], dict[str, float]()
        if orders[0] and self.precision.is_undecided(engine.accelerator.device):
            change = functools.partial(self._first_order, engine, args, past.params_before, past.update)
            prompts = engine.accelerator.gather(completions.prompt_index)
            noise = self.precision.decide(change, prompts, engine.accelerator)
            metrics |= {} if noise is None else {"entropy/precision_noise": noise}
        before = self._score(engine, args, past.params_before, past.update, orders[0])
        after = self._score(engine, args, past.params_after, past.update, orders[1])
        ends = Ends(before, after, after if drawn_after else before)
        record.probe_batch = ScoredCompletions(completions, before, after, *self._weights(ends))
        metrics |= self._changes(ends, engine.accelerator) | self._quantity_changes(ends, engine.accelerator)
        metrics |= router_flips(before.experts, after.experts, completions.loss_mask.bool(), engine.accelerator)
        if self.attribution is not None:
            probe = self._batch_before(ends, metrics, engine.accelerator)
            metrics |= self.attribution.attribute(args, past, engine, record, probe, files)
        if self._num_probed % _NOISE_FLOOR_EVERY == 0:
            metrics |= self._noise_floor(ends, args, past, engine)
        if computes_below_float32(engine):
            metrics |= self._model_change(args, past, engine, drawn_after)
        if self.placebo:
            metrics |= self._placebo(ends, args, past, engine)
        metrics |= metrics_of_all([self.entropy.agreement, *self.quantities.agreements])
        self._num_probed += 1
        self._write(args, files, record, ends, drawn_after, distribution)
        return metrics

    def _score(
        self,
        engine: Engine,
        args: ProbeChecks,
        params: Params,
        direction: Params | None,
        order: int,
        in_other_batches: bool = False,
        precision: DerivativePrecision | None = None,
    ) -> TokenScores:
        """Score E in float32 with `params` in the model: each rank its own rows; if one rank fails, all do."""
        with (
            rank_symmetric(engine.accelerator, "scoring the entropy probe's completions"),
            engine.scoring_model(params, differentiated=False) as model,
        ):
            size, precision = self.batch_size, precision or self.precision
            if in_other_batches:
                size = max(1, rows_at_once(model, self._completions, size, _ORDERS[self.prediction][0]) // 2 - 1)
            return precision.score(model, self._completions, args.temperature, size, params, direction, order)

    def _first_order(
        self,
        engine: Engine,
        args: ProbeChecks,
        params: Params,
        direction: Params,
        precision: DerivativePrecision | None = None,
        drawn_by: TokenScores | None = None,
    ) -> Linearization:
        """(T8): grad h . `direction` on E, by default taken as the policy's own, nats per token. Collective."""
        scores = self._score(engine, args, params, direction, order=1, precision=precision)
        terms = self._terms(scores, drawn_by or scores, engine.accelerator)
        assert terms.tangents is not None
        return delta_linear(terms.terms, terms.tangents)

    def _terms(
        self, scores: TokenScores, drawn_by: TokenScores, accelerator: Accelerator, form: Any = "decision"
    ) -> PointTerms:
        """The entropy terms of each completion of all ranks, in rank order. Collective."""
        mask = self._completions.loss_mask
        terms = point_terms(scores.entropy, scores.logps, self._sampling_logps(drawn_by), mask, form)
        return unstacked(accelerator.gather(stacked(terms)))

    def _sampling_logps(self, policy: TokenScores) -> Tensor:
        return self._completions.drawn_with(policy.logps[0])

    def _sampler_weights(self, policy: TokenScores) -> Tensor:
        """Mean importance weight over the tokens of each completion, when vLLM drew it."""
        mask = self._completions.loss_mask
        weights = importance_weights(policy.logps[0], self._sampling_logps(policy), mask)
        return weights.where(mask.bool(), 0.0).sum(1) / mask.sum(1)

    def _changes(self, ends: Ends, accelerator: Accelerator) -> dict[str, float]:
        """The metrics of the step's entropy change on E; adds its pairs to the running agreement. Collective."""
        prompts = accelerator.gather(self._completions.prompt_index)
        points = self._points(ends, accelerator)
        logged = self.entropy.add(*points, prompts, self._second_order)
        drawn, other = reversed(points) if ends.drawn_by is ends.after else points
        logged["entropy/importance_ess"] = importance_sample_size(drawn, other)
        if self._completions.sampling_logps is not None:
            mean_weights = accelerator.gather(self._sampler_weights(ends.drawn_by))
            logged["entropy/sampler_ess"] = effective_sample_size(mean_weights).item()
        logged |= {"entropy/num_completions": len(prompts), "entropy/num_prompts": len(prompts.unique())}
        by_sequence = step_changes(*self._points(ends, accelerator, "sequence"))
        for name in ("measured", "linear"):
            if name in by_sequence:
                logged |= with_stderr(f"entropy/delta_{name}_sequence", by_sequence[name].estimate(prompts))
        return logged

    def _quantity_changes(self, ends: Ends, accelerator: Accelerator) -> dict[str, float]:
        """The metrics of what the step did to numbers of E's completions (T21). Collective."""
        values, self._reward_coefficients = values_asked_for(self._completions.values, self.change_of), None
        self.quantities.agreements = []
        if not values:
            return {}
        sampling, mask = self._sampling_logps(ends.drawn_by), self._completions.loss_mask
        sums = [log_weight_sums(scores.logps, sampling, mask) for scores in (ends.before, ends.after)]
        *weights, columns = gathered_on_host(accelerator, *sums, torch.stack(list(values.values()), dim=1))
        prompts = accelerator.gather(self._completions.prompt_index).cpu()
        named = dict(zip(values, columns.unbind(1), strict=True))
        if self.attribution is not None and self.attribution.with_reward and "reward" in named:
            first = accelerator.process_index * len(self._completions)
            of_all = slope_coefficients(named["reward"], weights[0], prompts)
            self._reward_coefficients = of_all[first : first + len(self._completions)].to(accelerator.device)
        return self.quantities.add(named, weights, prompts)

    def _points(self, ends: Ends, accelerator: Accelerator, form: Any = "decision") -> tuple[PointTerms, PointTerms]:
        """The entropy terms before and after the step. Collective."""
        before, after = (self._terms(scores, ends.drawn_by, accelerator, form) for scores in (ends.before, ends.after))
        return before, after

    def _weights(self, ends: Ends) -> tuple[Tensor, Tensor]:
        """Importance weights (T6) of the policies before and after the step, (B, T)."""
        sampling, mask = self._sampling_logps(ends.drawn_by), self._completions.loss_mask
        before, after = (importance_weights(scores.logps[0], sampling, mask) for scores in (ends.before, ends.after))
        return before, after

    def _batch_before(self, ends: Ends, metrics: dict[str, float], accelerator: Accelerator) -> ProbeBatch:
        """E before the step, as the attribution needs it. Collective."""
        terms, reward = self._terms(ends.before, ends.drawn_by, accelerator).terms, None
        if self._reward_coefficients is not None:
            reward = RewardSlope(self._reward_coefficients, metrics["reward/delta_linear"])
        return ProbeBatch(self._completions, self._weights(ends)[0], terms, metrics["entropy/delta_linear"], reward)

    def _noise_floor(self, ends: Ends, args: ProbeChecks, past: PastUpdate, engine: Engine) -> dict[str, float]:
        """How much the entropy changes by rounding alone: same parameters, scored in batches of another size."""
        again = self._score(engine, args, past.params_before, None, order=0, in_other_batches=True)
        values = [self._entropy(scores, ends.drawn_by, engine.accelerator) for scores in (ends.before, again)]
        return {"entropy/noise_floor": abs(values[0] - values[1])}

    def _entropy(self, scores: TokenScores, drawn_by: TokenScores, accelerator: Accelerator) -> float:
        """The entropy (T6) on E, nats per token. Collective."""
        mask = self._completions.loss_mask
        weights = importance_weights(scores.logps[0], self._sampling_logps(drawn_by), mask)
        terms = entropy_terms(scores.entropy[0], weights, mask)
        return policy_entropy(RatioTerms(*accelerator.gather(torch.stack(terms, dim=1)).unbind(1))).value.item()

    def _model_change(
        self, args: ProbeChecks, past: PastUpdate, engine: Engine, drawn_after: bool
    ) -> dict[str, float]:
        """The same change in the precision that training computes in: mostly rounding at small learning rates."""
        ends = []
        for params in (past.params_before, past.params_after):
            with (
                rank_symmetric(engine.accelerator, "scoring with the training precision"),
                engine.scoring_model(params, dtype=None, differentiated=False) as model,
            ):
                ends.append(score(model, self._completions, args.temperature, self.batch_size))
        values = [self._entropy(scores, ends[drawn_after], engine.accelerator) for scores in ends]
        return {"entropy/delta_measured_model": values[1] - values[0]}

    def _placebo(self, ends: Ends, args: ProbeChecks, past: PastUpdate, engine: Engine) -> dict[str, float]:
        """
        Predict this step's change from an earlier update. The n-th probed step's update replaces the one that is kept
        with probability 1/n, so that each earlier update is kept with the same probability.
        """
        logged: dict[str, float] = {}
        if self._earlier_update is not None:
            # A resumed run has it on the CPU, from the checkpoint.
            direction = send_to_device(self._earlier_update, engine.accelerator.device)
            change = self._first_order(engine, args, past.params_before, direction, drawn_by=ends.drawn_by)
            predicted = change.estimate(engine.accelerator.gather(self._completions.prompt_index))
            self.entropy.agreement.add_pair("placebo", predicted, self.entropy.measured)
            logged = with_stderr("entropy/delta_placebo", predicted)
        if random.Random(self._num_probed).random() < 1 / (self._num_probed + 1):
            self._earlier_update = {name: value.clone() for name, value in past.update.items()}
        return logged

    def _write(
        self,
        args: ProbeChecks,
        files: ProbeFiles,
        record: StepRecord,
        ends: Ends,
        drawn_after: bool,
        distribution: str,
    ) -> None:
        """
        Write `probes/entropy/step_*.safetensors`; with it and the checkpoints of steps s - 1 and s every number of
        step s can be recomputed.
        """
        tensors = self._completions.tensors()
        tensors |= {"logps_before": ends.before.logps[0], "logps_after": ends.after.logps[0]}
        tensors |= {"entropy_before": ends.before.entropy[0], "entropy_after": ends.after.entropy[0]}
        tensors |= {f"value/{key}": column.float() for key, column in self._completions.values.items()}
        described: dict[str, object] = {"drawn": "after the step" if drawn_after else "before the step"}
        described["learning_rate"] = record.learning_rate
        if "sampling_logps" in tensors and drawn_after and not args.use_vllm:
            described["sampler"] = "an earlier policy"
        files.write(self.name, record.step, tensors, distribution, **described)
