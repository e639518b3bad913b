"""
What each token of a step costs in entropy and earns in reward, by gradients from the rollouts of steps before (T24).

E are the completions of earlier steps, U those of the step whose tokens are chosen.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from trl_entropy.config.dr_grpo import DrGRPOConfig
from trl_entropy.control.entropy_control import DEFAULT_METRIC_FLOOR
from trl_entropy.engine import Engine, UpdateContext, rank_symmetric
from trl_entropy.engine.optimizer_step import preconditioner_of_step
from trl_entropy.estimators.attribution.shares import on_policy_coefficients, token_contributions
from trl_entropy.estimators.control.entropy_control import RunningHalves, Vector, floored_metric
from trl_entropy.estimators.entropy_change.expectation import slope_coefficients
from trl_entropy.gradients.scores import Params, score
from trl_entropy.gradients.sequence_products import entropy_shares, gradients_of, weighted_logps
from trl_entropy.probes import model_checks
from trl_entropy.probes.probe import Probe
from trl_entropy.rollouts.batch import RolloutBatch, TrainingBatch
from trl_entropy.rollouts.completions import Completions
from trl_entropy.runs.state import StateDict

WHAT = "token_control='exchange'"


class TokenParts(NamedTuple):
    """
    (T24): each token's part of the first-order change of the entropy, nats per token, and of the expected reward, both
    divided by the learning rate and clip factor of the step, which is not made yet. 0 where the policy drew no token.
    """

    entropy: Float[Tensor, "B T"]
    reward: Float[Tensor, "B T"]


class TokenExchange(Probe):
    """
    Takes grad h and grad J, of the entropy and of the expected reward, on the completions of each step whose entropy
    is below a floor, and tells of each token of the step after it what it costs and earns (T24).

    What it tells of a step depends on earlier steps' completions alone, by the gradients and by the floor, apart from
    the tokens themselves: their own advantages and probabilities.

    Cost, in a step below the floor: a forward and two backward passes over its completions, and two forward-mode
    passes over those of the next. Memory: four vectors of all trainable parameters with `gradient_ema`, two without.

    Args:
        floor: of the entropy, nats per token.
        gradient_ema: weight of earlier steps in the running means of both gradients, in [0, 1).
        batch_size: completions differentiated at a time, at most; None: as many as memory allows.
        metric_floor: lower bound of sqrt(v) in the metric M, as a multiple of its mean; see [`floored_metric`].
    """

    name = "token_control"
    state_name = "token_exchange"
    splits_steps = True

    def __init__(
        self,
        floor: float,
        gradient_ema: float = 0.7,
        batch_size: int | None = None,
        metric_floor: float = DEFAULT_METRIC_FLOOR,
    ) -> None:
        super().__init__(every=1)
        self.floor, self.batch_size, self.metric_floor = floor, batch_size, metric_floor
        self.running = RunningHalves(gradient_ema)
        # M grad h and M grad J for the next step's tokens; None unless the last step was below the floor.
        self.directions: tuple[Vector, Vector] | None = None
        self._sums: list[Float[Tensor, " 2"]] = []  # entropy and number of the step's tokens, by micro-batch

    @classmethod
    def from_config(cls, args: DrGRPOConfig) -> TokenExchange:
        assert args.token_control_floor is not None, "exchange is refused without a floor"
        return cls(args.token_control_floor, args.token_control_gradient_ema, args.probe_batch_size)

    def check_model(self, args: DrGRPOConfig, model: nn.Module) -> None:
        model_checks.check_full_distribution(args, model, WHAT)
        model_checks.check_scoring(model, WHAT, derivatives=True)
        model_checks.check_derivatives(model, WHAT)
        model_checks.check_no_dropout(model, WHAT)
        model_checks.check_own_completions(model, WHAT)
        model_checks.check_no_auxiliary_loss(args, model, WHAT)

    def reset(self) -> None:
        self._sums.clear()

    # ---- events

    def on_micro_batch(self, args, state, control, *, metrics, mask, token_entropy, **kwargs: Any) -> None:
        self._sums.append(torch.stack([(token_entropy.double() * mask).sum(), mask.sum().double()]))

    def on_before_update(
        self, args, state, control, *, metrics, update: UpdateContext, engine, rollouts, **kwargs: Any
    ) -> None:
        total, count = engine.accelerator.reduce(torch.stack(self._sums).sum(0), reduction="sum").tolist()
        self._sums.clear()
        entropy = total / count if count else math.nan
        rewards, prompts = (engine.accelerator.gather(one) for one in (rollouts.rewards, rollouts.prompt_index))
        if not entropy < self.floor or rewards.isnan().all():
            self.running.skip()
            self.directions = None
            return
        earned = slope_coefficients(rewards, torch.zeros(len(rewards), 1, device=rewards.device), prompts)
        shares = self._gradients(args, engine, update.params_before, rollouts, earned, (entropy, count))
        gradients = self.running.add(shares)
        metric = floored_metric(preconditioner_of_step(update), self.metric_floor)
        first, second = ({name: (m * g[name]).to(m.dtype) for name, m in metric.items()} for g in gradients)
        self.directions = first, second

    # ---- asked when the next completions have been drawn

    def parts(self, batch: TrainingBatch, args: DrGRPOConfig, engine: Engine) -> TokenParts | None:
        """
        What each token of a new generation, one step's, costs and earns; None unless the last step's entropy was below
        the floor. Collective.
        """
        if self.directions is None:
            return None
        completions = Completions.of(RolloutBatch.from_micro_batches([batch], by_present_policy=True))
        params, mask, advantages = engine.assemble(engine.theta()), completions.loss_mask, batch["advantages"]
        with (
            rank_symmetric(engine.accelerator, "deriving the completions' scores for the token control"),
            engine.scoring_model(params) as model,
        ):
            found = [
                score(model, completions, args.temperature, self.batch_size, params, on_device(direction, params), 1)
                for direction in self.directions
            ]
        number = len(completions) * engine.accelerator.num_processes
        coefficients = on_policy_coefficients(advantages, mask, number, args.max_completion_length)
        return TokenParts(*(token_contributions(coefficients, one.logps[1], mask, 1.0) for one in found))

    # ---- resuming

    def state_dict(self) -> StateDict:
        running = self.running.sums, self.running.weight
        return {"running": running, "directions": self.directions and list(self.directions)}

    def load_state_dict(self, state: StateDict) -> None:
        self.running.sums, self.running.weight = state["running"]
        kept = state["directions"]
        self.directions = (kept[0], kept[1]) if kept else None

    # ---- the step of `on_before_update`

    def _gradients(
        self,
        args: DrGRPOConfig,
        engine: Engine,
        params: Vector,
        rollouts: RolloutBatch,
        earned: Float[Tensor, " N"],
        whole: tuple[float, float],
    ) -> tuple[Vector, Vector]:
        """
        grad h and grad J on the step's completions, over all ranks. Collective.

        Args:
            earned: c_i of (T22) of the completions of all ranks.
            whole: entropy, nats per token, and number of tokens over all ranks.
        """
        completions, first = Completions.of(rollouts), engine.accelerator.process_index * len(rollouts.rewards)
        own = earned[first : first + len(completions)].unsqueeze(1).expand(completions.loss_mask.shape)
        values = [entropy_shares(*whole), weighted_logps(own)]
        with (
            rank_symmetric(engine.accelerator, "differentiating entropy and reward for the token control"),
            engine.scoring_model(params) as model,
        ):
            shares = gradients_of(model, completions, values, args.temperature, self.batch_size)
        of_entropy, of_reward = (
            {name: engine.accelerator.reduce(share[name], reduction="sum") for name in engine.parameters}
            for share in shares
        )
        return of_entropy, of_reward


def on_device(direction: Vector, params: Params) -> Vector:
    """The vector where the parameters are; a resumed run's comes from a file, on the CPU."""
    return {name: value.to(params[name].device) for name, value in direction.items()}
