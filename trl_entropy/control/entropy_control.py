"""
Correct each optimizer step so that the policy's entropy stays at a target or changes by a given amount (T19).

E is the probe batch, completions that are drawn for this purpose; U the step's own completions.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from jaxtyping import Float
from torch import Tensor, nn
from transformers import TrainerState

from trl_entropy.config.dr_grpo import DrGRPOConfig
from trl_entropy.engine import Engine, UpdateContext, rank_symmetric
from trl_entropy.engine.build import upcasts_when_sharding
from trl_entropy.engine.optimizer_step import metric_of_step, preconditioner_of_step, read_before_step
from trl_entropy.estimators.control.entropy_control import (
    ControlProducts,
    Correction,
    PredictionCheck,
    RunningHalves,
    SetPoint,
    Vector,
    control_products,
    correction,
    crossed_change,
    difference,
    floored_metric,
    mean_of,
)
from trl_entropy.estimators.control.release import Release
from trl_entropy.estimators.entropy_change.delta_entropy import RatioTerms, entropy_terms, policy_entropy
from trl_entropy.estimators.statistics.estimate import Estimate
from trl_entropy.gradients.inputs import counts_columns
from trl_entropy.gradients.scores import Params, score
from trl_entropy.gradients.sequence_products import entropy_gradient, gradient_of, weighted_logps
from trl_entropy.probes import model_checks
from trl_entropy.probes.model_checks import dropout_of
from trl_entropy.probes.probe import Probe
from trl_entropy.probes.step_record import StepRecord
from trl_entropy.rollouts.completions import Completions
from trl_entropy.runs.state import StateDict

logger = logging.getLogger(__name__)

DEFAULT_CAP, DEFAULT_METRIC_FLOOR = 1.0, 0.1
# Added to the step that seeds the draw of E, so that these are not the completions that the entropy probe measures on.
_OTHER_DRAW = 1_000_000_000


class Halves(NamedTuple):
    """
    Completions of even and of odd prompts.

    Attributes:
        rows: this rank's completions of each half.
        entropies, num_tokens: each half's entropy, nats per token, and number of tokens, over all ranks.
        terms, prompts: entropy terms and prompt numbers of all completions of all ranks.
    """

    rows: tuple[Completions, Completions]
    entropies: tuple[float, float]
    num_tokens: tuple[float, float]
    terms: RatioTerms
    prompts: Tensor


class EntropyControl(Probe):
    """
    Corrects every optimizer step so that the policy's entropy changes, to first order, by a required amount: the
    smallest correction in the optimizer's metric (T19). It is added to the float32 parameters after the optimizer's
    step and does not enter its moments.

    With mode `"report"` nothing is corrected; the correction that would be made is only logged.

    Cost: a probe batch of its own and a forward and backward pass of it (`"probe"`), or a forward and backward pass of
    one and a half times the step's own completions (`"rollouts"`). Memory: ten vectors of all trainable parameters,
    and four more for `gradient_ema`.

    Args:
        mode: `"hold"` corrects in both directions, `"floor"` only if the entropy would otherwise change by less than
            required, `"report"` not at all.
        set_point: gives the required change of each step from the entropy before it; None: `per_step` in every step.
        per_step: required change, nats per token and step.
        cap: largest length of the correction, relative to the optimizer's step, both in the norm of M^-1.
        metric_floor: lower bound of sqrt(v) in the metric M, as a multiple of its mean; see [`floored_metric`].
        source: completions that the entropy gradient grad h is computed from: `"probe"` (E) or `"rollouts"` (U).
        gradient_ema: weight of earlier steps in the running mean of grad h, see [`RunningHalves`]; only with
            `"probe"`, since earlier steps' rollouts are in the optimizer's momentum too.
        num_prompts: prompts of the probe batch, over all processes.
        batch_size: completions differentiated at a time, at most; None: as many as memory allows.
        draw: called as `(step, rank) -> Completions` in place of sampling from the policy.
        release: when to let go for good, by the rewards of the steps; None: never.
    """

    name = "entropy_control"

    def __init__(
        self,
        mode: str = "report",
        set_point: SetPoint | None = None,
        per_step: float = 0.0,
        cap: float = DEFAULT_CAP,
        metric_floor: float = DEFAULT_METRIC_FLOOR,
        source: str = "probe",
        gradient_ema: float = 0.7,
        num_prompts: int = 128,
        batch_size: int | None = None,
        draw: Callable[[int, int], Completions] | None = None,
        release: Release | None = None,
    ) -> None:
        super().__init__(every=1)
        self.mode, self.set_point, self.per_step, self.cap = mode, set_point, per_step, cap
        self.metric_floor, self.source, self.num_prompts = metric_floor, source, num_prompts
        self.batch_size, self.draw, self.release = batch_size, draw, release
        self.running = RunningHalves(gradient_ema if source == "probe" else 0.0)
        self.prediction_check = PredictionCheck()
        self.active = mode != "report"
        # Of the last step: the predicted change, the covariance of its error with the entropy's, the entropy before.
        self._before: tuple[float, float, Estimate] | None = None
        # Entropy terms and prompts of the step's own completions on this process, one pair per micro-batch.
        self._own: list[tuple[RatioTerms, Tensor]] = []
        self._pools_rollouts = True

    @classmethod
    def from_config(cls, args: DrGRPOConfig) -> EntropyControl:
        target, level = args.entropy_control_target, args.entropy_control_release
        return cls(
            mode=args.entropy_control,
            set_point=None if target is None else SetPoint(target, args.entropy_control_gain),
            per_step=args.entropy_control_per_step or 0.0,
            source=args.entropy_control_completions,
            gradient_ema=args.entropy_control_gradient_ema,
            num_prompts=args.entropy_control_num_completions,
            batch_size=args.probe_batch_size,
            release=None if level is None else Release(level, args.entropy_control_release_steps),
        )

    splits_steps = True

    @property
    def needs_loss_coefficients(self) -> bool:
        return self.source == "rollouts" and not self.has_let_go

    @property
    def has_let_go(self) -> bool:
        """Whether it has let go of the entropy for good."""
        return self.release is not None and self.release.released

    def check_model(self, args: DrGRPOConfig, model: nn.Module) -> None:
        what = "entropy_control"
        if self.source == "rollouts":
            model_checks.check_full_distribution(args, model, what)
        model_checks.check_scoring(model, what)
        model_checks.check_derivatives(model, what)
        # DeepSpeed steps a float32 master, and FSDP2 makes float32 of what it shards.
        is_float32 = args.deepspeed_plugin is not None or upcasts_when_sharding(args.bf16)
        if self.mode != "report" and not is_float32:
            model_checks.check_float32_parameters(model, f"entropy_control={self.mode!r}")
        # Else what the loss computes of the step's completions is not of the policy that E is drawn from.
        all_drawn = model_checks.draws_full_distribution(args, model)
        self._pools_rollouts = all_drawn and not dropout_of(model) and not counts_columns(model)
        if self.source == "rollouts":
            model_checks.check_no_dropout(model, "entropy_control_completions='rollouts'")
            model_checks.check_own_completions(model, "entropy_control_completions='rollouts'")
            model_checks.check_no_auxiliary_loss(args, model, "entropy_control_completions='rollouts'")

    def reset(self) -> None:
        self._own.clear()

    # ---- events

    def on_rollouts_drawn(self, args, state, control, *, metrics, accelerator, drawn, **kwargs: Any) -> None:
        if self.release is None or self.release.released:
            return
        self.release.add(_mean_over_ranks(drawn.rewards, accelerator))
        if self.release.released and state.is_world_process_zero:
            logger.info(
                "entropy_control lets go from step %d on: the mean reward was at least %g in %d steps in a row.",
                state.global_step + 1, self.release.level, self.release.steps,
            )  # fmt: skip

    def on_micro_batch(self, args, state, control, *, metrics, inputs, mask, token_entropy, **kwargs: Any) -> None:
        is_the_policys = self._pools_rollouts and args.rollouts_are_the_policys()
        if self.source != "rollouts" and is_the_policys and not self.has_let_go:
            terms = entropy_terms(token_entropy, mask.double(), mask)
            self._own.append((terms, inputs["prompt_index"]))

    def on_before_update(
        self, args, state, control, *, metrics, update: UpdateContext, engine, sampler, rollouts, **kwargs: Any
    ) -> None:
        if self.has_let_go:
            return
        step, rank = state.global_step + 1, engine.accelerator.process_index
        if self.source == "rollouts":
            self._completions = Completions.of(rollouts)
        elif self.draw is not None:
            self._completions = self.draw(step, rank)
        else:
            self._completions = sampler.draw(self.num_prompts, "held_out", step + _OTHER_DRAW)
        read_before_step(update)

    def on_after_update(
        self, args, state, control, *, metrics, update: UpdateContext, engine, record, **kwargs: Any
    ) -> None:
        if self.release is not None:
            metrics["entropy_control/released"] = float(self.has_let_go)
        if self.has_let_go or update.step_skipped:
            self._own.clear()
            return
        params, temperature = update.params_before, args.temperature
        halves = score_prompt_halves(engine, params, self._completions, temperature, self.batch_size)
        entropy = self._entropy(halves, engine)
        self._learn_realised(entropy, metrics, state)
        gradients = self.running.add(half_gradients(engine, params, halves, temperature, self.batch_size))
        metric = floored_metric(preconditioner_of_step(update), self.metric_floor)
        products = control_products(gradients, update.update, metric, update.gradient)
        if self.source == "rollouts":
            change = self._change_across_halves(args, update, engine, record, gradients)
            products = products._replace(change=change)
        target_change = self.per_step if self.set_point is None else self.set_point.target_change(entropy.value)
        asked = correction(products, target_change, self.mode == "floor", self.cap)
        if self.active:
            g = mean_of(gradients)
            update.correct({name: (asked.multiplier * m * g[name]).to(m.dtype) for name, m in metric.items()})
        follows = self.active and not asked.infeasible and self.set_point is not None
        sensitivity = self.set_point.sensitivity(entropy.value) if follows and self.set_point else 0.0
        predicted = asked.predicted if self.active else products.change
        self._before = predicted, sensitivity * entropy.stderr**2, entropy
        metrics |= self._logged(products, asked, target_change, update)

    # ---- resuming

    def state_dict(self) -> StateDict:
        before = None if self._before is None else [*self._before[:2], *vars(self._before[2]).values()]
        bias = None if self.set_point is None else self.set_point.bias
        kept = self.running.sums, self.running.weight
        return {
            "pairs": self.prediction_check.pairs,
            "active": self.active or self.mode == "report",  # whether it has not switched itself off
            "before": before,
            "bias": bias,
            "running": kept,
            "release": self.release and [self.release.streak, self.release.released],
        }

    def load_state_dict(self, state: StateDict) -> None:
        self.prediction_check.pairs = [tuple(pair) for pair in state["pairs"]]
        self.active = state["active"] and self.mode != "report"
        self.running.sums, self.running.weight = state["running"]
        if state["before"] is not None:
            predicted, shared, *entropy = state["before"]
            self._before = predicted, shared, Estimate(*entropy)
        if self.set_point is not None and state["bias"] is not None:
            self.set_point.bias = state["bias"]
        if self.release is not None and state.get("release"):
            self.release.streak, self.release.released = state["release"]

    # ---- the steps of `on_after_update`

    def _entropy(self, halves: Halves, engine: Engine) -> Estimate:
        """The policy's entropy, from E and, if the policy itself drew them, the step's completions. Collective."""
        terms, prompts = halves.terms, halves.prompts
        for own, index in self._own:
            terms = RatioTerms(*(torch.cat(pair) for pair in zip(terms, _gathered(own, engine), strict=True)))
            prompts = torch.cat([prompts, -1 - engine.accelerator.gather(index)])  # numbers that E does not use
        self._own.clear()
        return policy_entropy(terms).estimate(prompts)

    def _change_across_halves(
        self,
        args: DrGRPOConfig,
        update: UpdateContext,
        engine: Engine,
        record: StepRecord,
        gradients: tuple[Vector, Vector],
    ) -> float:
        """
        The predicted change g . d, g the entropy gradient and d the optimizer's step, without each prompt's effect on
        itself: each half's g is multiplied with the loss gradient of the other half. Collective.
        """
        found, rollouts = record.loss_coefficients, record.rollouts
        assert found is not None, "needs_loss_coefficients"
        coefficients = found.policy if found.kl is None else found.policy + found.kl
        even = rollouts.prompt_index % 2 == 0
        with (
            rank_symmetric(engine.accelerator, "differentiating half of the step's loss"),
            engine.scoring_model(update.params_before) as model,
        ):
            rows, value = Completions.of(rollouts).rows(even), weighted_logps(-coefficients[even])
            share = gradient_of(model, rows, value, args.temperature, self.batch_size)
        return crossed_change(
            gradients, _summed(share, engine), update.gradient, update.update, metric_of_step(update)
        )

    def _learn_realised(self, entropy: Estimate, metrics: dict[str, float], state: TrainerState) -> None:
        """Compare the last step's predicted change with the measured one; switch off if the predictions are wrong."""
        metrics |= {"entropy_control/entropy": entropy.value, "entropy_control/entropy_stderr": entropy.stderr}
        metrics["entropy_control/num_prompts"] = entropy.dof + 1
        if self._before is None:
            return
        predicted, shared, before = self._before
        realised = difference(entropy, before)
        self.prediction_check.add(predicted, realised, shared)
        if self.set_point is not None:
            self.set_point.learn(predicted, realised.value)
        slope, error = self.prediction_check.slope()
        metrics |= {"entropy_control/realised_previous": realised.value, "entropy_control/slope": slope}
        metrics["entropy_control/slope_stderr"] = error
        if self.active and self.prediction_check.failed:
            self.active = False
            if state.is_world_process_zero:
                logger.warning(
                    "entropy_control is off from step %d on: over %d steps the entropy changed by %.2f +- %.2f times "
                    "the predicted change. Lower the learning rate, or raise entropy_control_num_completions.",
                    state.global_step + 1, self.prediction_check.window, slope, self.prediction_check.margin(),
                )  # fmt: skip

    def _logged(
        self, products: ControlProducts, asked: Correction, target_change: float, update: UpdateContext
    ) -> dict[str, float]:
        lr = max(update.learning_rate.values())
        made = {
            "delta_optimizer": products.change,
            "delta_predicted": asked.predicted if self.active else products.change,
            "target_change": target_change,
            "correction_coefficient": asked.multiplier,
            "correction_coefficient_over_lr": asked.multiplier / lr if lr else float("nan"),
            "relative_size": asked.relative_size,
            "infeasible": float(asked.infeasible),
            "noise_share": products.noise_share,
            "price": products.price,
            "active": float(self.active),
        }
        return {f"entropy_control/{name}": value for name, value in made.items()}


def score_prompt_halves(
    engine: Engine, params: Params, batch: Completions, temperature: float, batch_size: int | None
) -> Halves:
    """Score the batch (E or U) with the parameters before the step, and split it by prompt. Collective."""
    accelerator = engine.accelerator
    with (
        rank_symmetric(accelerator, "scoring the completions of the entropy control"),
        engine.scoring_model(params) as model,
    ):
        scores = score(model, batch, temperature, batch_size, params)
    local = entropy_terms(scores.entropy[0], batch.loss_mask.double(), batch.loss_mask)
    terms = _gathered(local, engine)
    prompts = accelerator.gather(batch.prompt_index)
    parts = [RatioTerms(*(part[prompts % 2 == parity] for part in terms)) for parity in (0, 1)]
    return Halves(
        tuple(batch.rows(batch.prompt_index % 2 == parity) for parity in (0, 1)),  # type: ignore[arg-type]
        tuple(float(policy_entropy(part).value) for part in parts),  # type: ignore[arg-type]
        tuple(float(part.denominator.sum()) for part in parts),  # type: ignore[arg-type]
        terms,
        prompts,
    )


def half_gradients(
    engine: Engine, params: Params, halves: Halves, temperature: float, batch_size: int | None
) -> tuple[Vector, Vector]:
    """The entropy gradient grad h of each half at `params`, over all ranks. Collective."""
    with (
        rank_symmetric(engine.accelerator, "differentiating the entropy for the entropy control"),
        engine.scoring_model(params) as model,
    ):
        shares = [
            entropy_gradient(model, rows, temperature, batch_size, entropy, num_tokens)
            for rows, entropy, num_tokens in zip(*halves[:3], strict=True)
        ]
    return _summed(shares[0], engine), _summed(shares[1], engine)


def _mean_over_ranks(rewards: Float[Tensor, " B"], accelerator: Accelerator) -> float:
    """The mean over those of all ranks that are numbers; nan if none is. Collective."""
    known = rewards[~rewards.isnan()].double()
    total, count = accelerator.reduce(torch.stack([known.sum(), known.new_tensor(len(known))]), "sum").tolist()
    return total / count if count else math.nan


def _gathered(terms: RatioTerms, engine: Engine) -> RatioTerms:
    """The terms of all ranks' completions. Collective."""
    return RatioTerms(*engine.accelerator.gather(torch.stack(terms, dim=1)).unbind(1))


def _summed(share: Mapping[str, Tensor], engine: Engine) -> dict[str, Tensor]:
    """The sum of `share` over ranks. Collective."""
    return {name: engine.accelerator.reduce(share[name], reduction="sum") for name in engine.parameters}
