"""Which part of the step, which completion and which token caused the first-order entropy change (T9)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from accelerate import Accelerator
from jaxtyping import Float, Int
from torch import Tensor, nn

from trl_entropy.config.probe_checks import ProbeChecks
from trl_entropy.engine import Engine, PastUpdate, rank_symmetric
from trl_entropy.estimators.attribution.shares import (
    Attribution,
    CategoryRecord,
    bin_index,
    category_sums,
    completion_contributions,
    crossed,
    token_contributions,
    update_products,
)
from trl_entropy.estimators.entropy_change.delta_entropy import RatioTerms, policy_entropy
from trl_entropy.estimators.statistics.pooled import PooledParts
from trl_entropy.gradients.auxiliary_loss import auxiliary_coefficient, auxiliary_slope
from trl_entropy.gradients.loss_coefficients import LossCoefficients
from trl_entropy.gradients.scores import TokenScores
from trl_entropy.gradients.sequence_products import (
    Value,
    entropy_gradient,
    gradient_of,
    gradient_products,
    weighted_entropies,
    weighted_logps,
)
from trl_entropy.probes.episodes import EpisodeRecords, kinds_of_rollouts
from trl_entropy.probes.files import ProbeFiles
from trl_entropy.probes.model_checks import check_no_dropout, check_sequences
from trl_entropy.probes.precision import DerivativePrecision
from trl_entropy.probes.prices import PriceRecord
from trl_entropy.probes.step_record import StepRecord
from trl_entropy.rollouts.batch import RolloutBatch
from trl_entropy.rollouts.completions import Completions
from trl_entropy.runs.change_metrics import OUTCOMES, OUTCOMES_BY_PROBABILITY, RARE
from trl_entropy.runs.state import StateDict

# From the mode to the categories by which contributions are summed over the run.
CATEGORIES = {"sequence": OUTCOMES, "token": OUTCOMES_BY_PROBABILITY}


class RewardSlope(NamedTuple):
    """
    The derivative of the expected reward on E before the step (T22): the coefficient of each of this rank's
    completions' grad S_i, and the first-order change grad J . dtheta.
    """

    coefficients: Float[Tensor, " B"]
    delta_linear: float


class ProbeBatch(NamedTuple):
    """
    The probe batch E, scored with the parameters from before the step: this rank's completions and their importance
    weights (T6), the entropy terms of all ranks' completions, and the first-order change grad h . dtheta, nats per
    token; of the reward likewise, where it is to be attributed.
    """

    completions: Completions
    weights: Float[Tensor, "B T"]
    terms: RatioTerms
    delta_linear: float
    reward: RewardSlope | None = None


class Contributions(NamedTuple):
    """
    What this rank's completions of the step (U) contribute to the entropy change, nats per token: delta_i for each
    completion (K = 1) or delta_ik for each of its tokens.

    Attributes:
        policy: contribution of the policy loss, that is the loss without its KL term and entropy bonus.
        other: contributions of the KL term and of the entropy bonus for each completion, if the loss has them, and of
            the loss that balances experts, which belongs to no completion, as one number.
        scores: token scores of U before the step; None by completion.
    """

    policy: Float[Tensor, "B K"]
    other: dict[str, Float[Tensor, " n"]]
    scores: TokenScores | None = None

    def with_others(self, more: dict[str, Float[Tensor, " n"]]) -> Contributions:
        return self._replace(other=self.other | more)


class StepAttribution:
    """
    Splits the first-order entropy change `entropy/delta_linear` of an optimizer's step into its parts (T9).

    The loss may be any function of the per-token log-probabilities and entropies: the coefficients alpha_ik are read
    from training's own backward pass. The KL to the reference policy and the entropy bonus are parts of their own. A
    completion counts as correct if its advantage is above 0: with rewards of 0 and 1, a right answer in a group that
    also has a wrong one.

    Cost, with E the probe batch and U the step's own completions: a forward and backward pass of E for grad h;
    `"sequence"` adds one such pass of U, and one more each for the KL term and the bonus; `"token"` adds a
    forward-mode pass of U.
    Memory: five vectors of all trainable parameters while it computes, beside the three of the step itself.

    Args:
        mode: `"sequence"` (by completion) or `"token"`.
        batch_size: completions differentiated at a time, at most; None: as many as memory allows.
        precision: of the gradients and derivatives; float32 if it is not given.
        with_reward: split the change of the expected reward too (T22), at the same cost again.
    """

    name = "attribution"

    def __init__(
        self,
        mode: str,
        batch_size: int | None,
        precision: DerivativePrecision | None = None,
        with_reward: bool = False,
    ) -> None:
        self.with_reward, self.prices = with_reward, PriceRecord(CATEGORIES[mode])
        self.mode, self.batch_size, self.precision = mode, batch_size, precision or DerivativePrecision()
        self.record = CategoryRecord.empty(CATEGORIES[mode])
        self.episodes = EpisodeRecords()

    # ---- called by the probe

    def check(self, args: ProbeChecks, model: nn.Module) -> None:
        """Raises `ValueError` that names a loss, a dropout or a trainable module that (T9) does not cover."""
        args.check_attribution()
        check_no_dropout(model, "entropy_attribution")
        if self.mode == "sequence":
            check_sequences(model, "entropy_attribution='sequence'")

    def attribute(
        self,
        args: ProbeChecks,
        past: PastUpdate,
        engine: Engine,
        record: StepRecord,
        probe: ProbeBatch,
        files: ProbeFiles,
    ) -> dict[str, float]:
        """Attribute the first-order change, write the contributions, and return what is logged. Collective."""
        accelerator = engine.accelerator
        rollouts, coefficients = record.rollouts, record.loss_coefficients
        assert coefficients is not None, "the entropy probe needs_loss_coefficients"
        gradient = self._entropy_gradient(past, engine, probe, args.temperature)
        attribution, contributions = self._split(past, engine, record, gradient, probe.delta_linear, args)
        sums, counts = self._sums(contributions, contributions.policy, rollouts, accelerator)
        self.record = self.record.update(sums, counts)
        logged, kinds, earned = _logged("entropy", attribution) | self._pooled(), None, None
        if probe.reward is not None:
            gradient = self._reward_gradient(past, engine, probe.completions, probe.reward, args.temperature)
            attribution, of_reward = self._split(past, engine, record, gradient, probe.reward.delta_linear, args)
            earned = of_reward.policy
            of_categories, _ = self._sums(contributions, earned, rollouts, accelerator)
            logged |= _logged("reward", attribution) | self.prices.add(sums, of_categories, counts)
        if rollouts.has_tool_mask and contributions.scores is not None:
            kinds, entropy = kinds_of_rollouts(rollouts, files.tokenizer), contributions.scores.entropy[0]
            logged |= self.episodes.add(contributions.policy, entropy, rollouts, kinds, accelerator, earned)
            for by in self.episodes.records.values():
                logged |= _changes_and_shares(by, {name: (name,) for name in by.present})
        self._write(files, record, contributions, coefficients, kinds, earned)
        return logged

    # ---- resuming

    def state_dict(self) -> StateDict:
        own = {"parts": {**vars(self.record.parts)}, "counts": self.record.counts}
        return own | {"episodes": self.episodes.state_dict(), "prices": self.prices.state_dict()}

    def load_state_dict(self, state: StateDict) -> None:
        self.record = CategoryRecord(self.record.names, PooledParts(**state["parts"]), state["counts"])
        self.episodes.load_state_dict(state.get("episodes", {}))
        self.prices.load_state_dict(state.get("prices"))

    # ---- the steps of `attribute`

    def _split(
        self,
        past: PastUpdate,
        engine: Engine,
        record: StepRecord,
        gradient: dict[str, Tensor],
        whole: float,
        args: ProbeChecks,
    ) -> tuple[Attribution, Contributions]:
        """The parts of `gradient` . dtheta, which is `whole`, of all ranks, and this one's completions. Collective."""
        accelerator, coefficients = engine.accelerator, record.loss_coefficients
        assert coefficients is not None
        products = update_products((gradient[name], parts) for name, parts in past.parts())
        direction = {name: metric * gradient[name] for name, metric in past.metric().items()}
        contributions = self._contributions(past, engine, record.rollouts, coefficients, direction, args)
        completions = accelerator.gather(contributions.policy.sum(1))
        other = {name: accelerator.gather(part) for name, part in contributions.other.items()}
        if past.correction:
            made = engine.dot(past.correction, gradient)
            other["entropy_control"] = completions.new_tensor([made], dtype=torch.float64)
        return Attribution(whole, products.momentum, products.weight_decay, completions, other), contributions

    def _reward_gradient(
        self, past: PastUpdate, engine: Engine, completions: Completions, reward: RewardSlope, temperature: float
    ) -> dict[str, Tensor]:
        """grad J over all ranks' probe batches E, as [`_entropy_gradient`]. Collective."""
        per_token = reward.coefficients.unsqueeze(1).expand(completions.loss_mask.shape)
        with (
            rank_symmetric(engine.accelerator, "differentiating the expected reward of the probe batch"),
            engine.scoring_model(past.params_before) as model,
            self.precision.products(engine.accelerator.device),
        ):
            share = gradient_of(model, completions, weighted_logps(per_token), temperature, self.batch_size)
        return {name: engine.accelerator.reduce(share[name], reduction="sum") for name in past.params_before}

    def _entropy_gradient(
        self, past: PastUpdate, engine: Engine, probe: ProbeBatch, temperature: float
    ) -> dict[str, Tensor]:
        """grad h over all ranks' probe batches E: computed by each rank alone, then summed over ranks. Collective."""
        entropy, num_tokens = float(policy_entropy(probe.terms).value), float(probe.terms.denominator.sum())
        params, size = past.params_before, self.batch_size
        with (
            rank_symmetric(engine.accelerator, "differentiating the entropy of the probe batch"),
            engine.scoring_model(params) as model,
            self.precision.products(engine.accelerator.device),
        ):
            share = entropy_gradient(model, probe.completions, temperature, size, entropy, num_tokens, probe.weights)
        return {name: engine.accelerator.reduce(share[name], reduction="sum") for name in params}

    def _contributions(
        self,
        past: PastUpdate,
        engine: Engine,
        rollouts: RolloutBatch,
        coefficients: LossCoefficients,
        direction: dict[str, Tensor],
        args: ProbeChecks,
    ) -> Contributions:
        """The contributions of this rank's completions, or of their tokens. Local."""
        completions, params, temperature = Completions.of(rollouts), past.params_before, args.temperature
        with (
            rank_symmetric(engine.accelerator, "attributing the entropy change to the step's completions"),
            engine.scoring_model(params) as model,
        ):
            balance = self._balance(args, model, completions, params, direction)
            if self.mode == "token":
                given = model, completions, temperature, self.batch_size, params
                scores = self.precision.score(*given, direction, order=1)
                return _by_token(scores, coefficients, completions.loss_mask).with_others(balance)

            def products(value: Value) -> Float[Tensor, " B"]:
                with self.precision.products(engine.accelerator.device):
                    return gradient_products(model, completions, value, direction, temperature, self.batch_size)

            return _by_completion(products, coefficients).with_others(balance)

    def _balance(
        self,
        args: ProbeChecks,
        model: nn.Module,
        completions: Completions,
        params: Mapping[str, Tensor],
        direction: dict[str, Tensor],
    ) -> dict[str, Float[Tensor, " 1"]]:
        """This rank's contribution of the loss that balances a mixture's experts; none without it. Local."""
        coefficient, ranks = auxiliary_coefficient(args, model), args.world_size
        if not coefficient:
            return {}
        with self.precision.products(completions.input_ids.device):
            slope = auxiliary_slope(model, completions, args.per_device_train_batch_size, params, direction)
        return {"router_aux_loss": completion_contributions(slope.reshape(1), coefficient / ranks)}

    def _sums(
        self,
        contributions: Contributions,
        parts: Float[Tensor, "B K"],
        rollouts: RolloutBatch,
        accelerator: Accelerator,
    ) -> tuple[Float[Tensor, "P C"], Int[Tensor, " C"]]:
        """
        The step's sums of `parts` by prompt and category, and each category's number of tokens; completions whose
        advantage is 0 belong to no category. Collective.
        """
        prompts = accelerator.gather(rollouts.prompt_index).unique()
        position = torch.searchsorted(prompts, rollouts.prompt_index)
        advantages = rollouts.raw_advantages.unsqueeze(1)
        shape = parts.shape
        categories, mask = (advantages <= 0).long().expand(shape), advantages != 0
        if contributions.scores is not None:
            common = bin_index(contributions.scores.logps[0], [math.log(RARE)])
            categories, mask = crossed(categories, common, 2), mask & rollouts.loss_mask.bool()
        found = category_sums(parts, categories, mask.expand(shape), position, len(prompts), len(self.record.names))
        sums, counts = (accelerator.reduce(part, reduction="sum") for part in found)
        return sums, counts

    def _pooled(self) -> dict[str, float]:
        """What each category and all add to the change over the run, and their shares of it and of the tokens."""
        names = self.record.names
        return _changes_and_shares(self.record, {**{name: (name,) for name in names}, "all": names})

    def _write(
        self,
        files: ProbeFiles,
        record: StepRecord,
        contributions: Contributions,
        coefficients: LossCoefficients,
        kinds: Int[Tensor, "B T"] | None,
        earned: Float[Tensor, "B K"] | None = None,
    ) -> None:
        """Write `probes/attribution/step_*.safetensors`, with the rows and columns of the rollouts' file."""
        rollouts = record.rollouts
        tensors = {
            "completion_mask": rollouts.completion_mask,
            "loss_mask": rollouts.loss_mask,
            "prompt_index": rollouts.prompt_index,
            "raw_advantages": rollouts.raw_advantages,
            "loss_coefficients": coefficients.policy.float(),
            "attribution": contributions.policy if self.mode == "token" else contributions.policy.squeeze(1),
        }
        if contributions.scores is not None:
            tensors |= {"logps": contributions.scores.logps[0], "entropy": contributions.scores.entropy[0]}
        if earned is not None:
            tensors["attribution_reward"] = earned if self.mode == "token" else earned.squeeze(1)
        if kinds is not None:
            tensors["kind"] = kinds.to(torch.uint8)
        files.write(self.name, record.step, tensors, learning_rate=record.learning_rate)


def _changes_and_shares(record: CategoryRecord, members: Mapping[str, tuple[str, ...]]) -> dict[str, float]:
    """What these categories add to the change, mean over the steps so far, and each one's share of all."""
    logged: dict[str, float] = {}
    for name, some in members.items():
        mean = record.change(*some)
        low, high = mean.interval()
        key = f"entropy/mean_delta_{name}"
        logged |= {key: mean.value, f"{key}_low": low, f"{key}_high": high}
    for name in (name for name in members if name in record.names):
        low, high = record.share_interval(name)
        key = f"entropy/share_{name}"
        logged |= {key: record.share(name).value, f"{key}_low": low, f"{key}_high": high}
        logged[f"entropy/token_share_{name}"] = record.token_share(name)
    return logged


def _by_token(scores: TokenScores, coefficients: LossCoefficients, loss_mask: Int[Tensor, "B T"]) -> Contributions:
    """delta_ik of each token, from derivatives of its score along lr c (1-b1)/(1-b1^t) M grad h."""
    derivatives = {"kl": scores.logps[1], "entropy_bonus": scores.entropy[1]}
    other = {
        name: token_contributions(given, derivatives[name], loss_mask, 1.0).sum(1)
        for name, given in _others(coefficients).items()
    }
    policy = token_contributions(coefficients.policy, scores.logps[1], loss_mask, 1.0)
    return Contributions(policy, other, scores)


def _by_completion(products: Callable[[Value], Float[Tensor, " B"]], coefficients: LossCoefficients) -> Contributions:
    """delta_i of each completion; `products(value)` are g_i' v, g_i the gradient of the completion's value."""
    weighted = {"kl": weighted_logps, "entropy_bonus": weighted_entropies}
    other = {
        name: completion_contributions(products(weighted[name](-given)), 1.0)
        for name, given in _others(coefficients).items()
    }
    policy = completion_contributions(products(weighted_logps(-coefficients.policy)), 1.0)
    return Contributions(policy.unsqueeze(1), other)


def _others(coefficients: LossCoefficients) -> dict[str, Float[Tensor, "B T"]]:
    """The coefficients of the KL term and of the entropy bonus, if the loss has them."""
    named = {"kl": coefficients.kl, "entropy_bonus": coefficients.entropy_bonus}
    return {name: given for name, given in named.items() if given is not None}


def _logged(quantity: str, attribution: Attribution) -> dict[str, float]:
    parts = {name: getattr(attribution, name) for name in ("momentum", "weight_decay", "gradient")}
    parts |= {name: float(part.sum()) for name, part in attribution.other.items()}
    return {
        **{f"{quantity}/delta_{name}": value for name, value in parts.items()},
        **{f"{quantity}/share_{name}": attribution.share(value) for name, value in parts.items()},
        f"{quantity}/attribution_rounding": attribution.relative_rounding,
    }
