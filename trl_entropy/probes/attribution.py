"""Which part of the step, which completion, which token made the first-order entropy change (T9)."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from jaxtyping import Float, Int
from torch import Tensor, nn

from trl_entropy.engine import Engine, UpdateContext, rank_symmetric
from trl_entropy.estimators.attribution import (
    Attribution,
    CategoryRecord,
    UpdateProducts,
    bin_index,
    category_sums,
    completion_contributions,
    crossed,
    token_contributions,
    update_products,
)
from trl_entropy.estimators.delta_entropy import RatioTerms, policy_entropy
from trl_entropy.estimators.pooled import PooledParts
from trl_entropy.probes.adamw_step import metric_of_step, read_before_step, update_parts
from trl_entropy.rollouts import RolloutBatch
from trl_entropy.scores import Completions, score
from trl_entropy.sequence_gradients import SequenceGradients
from trl_entropy.sequence_passes import entropy_gradient, gradient_products

# Mode -> what the contributions are pooled by. A token is rare if the policy gave it less than RARE.
CATEGORIES = {
    "sequence": ("correct", "incorrect"),
    "token": ("correct_rare", "correct_common", "incorrect_rare", "incorrect_common"),
}
RARE = 0.1


class ProbeBatch(NamedTuple):
    """E before the step: this rank's completions and weights (T6), all ranks' terms, grad h . dtheta."""

    completions: Completions
    weights: Float[Tensor, "B T"]
    terms: RatioTerms
    delta_linear: float


class StepAttribution:
    """
    (T9) for the entropy probe: the parts of `entropy/delta_linear`, of AdamW's step under any loss of per-token
    log-probabilities. alpha_ik comes from the backward pass of training itself.

    Correct is an advantage above 0: with a reward of 0 or 1, a right answer in a group that is not all right.
    Cost: grad h is a forward and backward pass of E; `"sequence"` adds one of U, `"token"` a forward-mode pass of U.
    Memory: three vectors of all trainable parameters, beside the moments and the gradient.

    Args:
        mode: `"sequence"`, or `"token"`.
        batch_size: completions differentiated at a time; halved on out-of-memory.
    """

    name = "attribution"

    def __init__(self, mode: str, batch_size: int) -> None:
        self.mode, self.batch_size = mode, batch_size
        self.record = CategoryRecord.empty(CATEGORIES[mode])
        self._loss_gradients: list[Float[Tensor, "b T"]] = []

    # ---- what the probe calls, in this order

    def check(self, args: Any, model: nn.Module) -> None:
        """Raises `ValueError` for a loss or a trainable module that (T9) does not cover, by name."""
        args.check_attribution()
        if self.mode == "sequence":
            SequenceGradients(model)

    def watch(self, loss_logps: Float[Tensor, "b T"]) -> None:
        """Keep dLoss/dS_ik of this micro-batch when its backward pass comes by."""
        loss_logps.register_hook(self._loss_gradients.append)

    def before_update(self, update: UpdateContext) -> None:
        """Have the step's ingredients kept. Collective."""
        read_before_step(update)

    def after_update(
        self, trainer: Any, update: UpdateContext, engine: Engine, rollouts: RolloutBatch, probe: ProbeBatch
    ) -> dict[str, float]:
        """Attribute the first-order change, write the contributions, and return what is logged. Collective."""
        accelerator, temperature = engine.accelerator, trainer.args.temperature
        gradient = self._entropy_gradient(update, engine, probe, temperature)
        products = UpdateProducts(0.0, 0.0, 0.0)
        for name, parts in update_parts(update):
            products = update_products(gradient[name], parts, products)
        direction = {name: metric * gradient[name] for name, metric in metric_of_step(update).items()}
        coefficients = self._loss_coefficients(rollouts, accelerator)
        contributions, common = self._contributions(update, engine, rollouts, coefficients, direction, temperature)
        completions = accelerator.gather(contributions.sum(1))
        attribution = Attribution(probe.delta_linear, products.momentum, products.weight_decay, completions)
        self._add_to_record(contributions, common, rollouts, accelerator)
        self._write(trainer, rollouts, contributions, coefficients)
        return _logged(attribution) | self._pooled()

    # ---- resuming

    def state_dict(self) -> dict[str, Any]:
        return {"parts": {**vars(self.record.parts)}, "counts": self.record.counts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.record = CategoryRecord(self.record.names, PooledParts(**state["parts"]), state["counts"])

    # ---- its steps

    def _entropy_gradient(
        self, update: UpdateContext, engine: Engine, probe: ProbeBatch, temperature: float
    ) -> dict[str, Tensor]:
        """grad h of all ranks' E. Local inside, then summed over ranks."""
        entropy, num_tokens = float(policy_entropy(probe.terms).value), float(probe.terms.denominator.sum())
        params, size = update.params_before, self.batch_size
        with (
            rank_symmetric(engine.accelerator, "differentiating the entropy of the probe batch"),
            engine.scoring_model(params) as model,
        ):
            share = entropy_gradient(model, probe.completions, temperature, size, entropy, num_tokens, probe.weights)
        return {name: engine.accelerator.reduce(share[name], reduction="sum") for name in params}

    def _loss_coefficients(self, rollouts: RolloutBatch, accelerator: Accelerator) -> Float[Tensor, "B T"]:
        """alpha_ik = -dLoss/dS_ik of the loss averaged over ranks, in the order of `rollouts`."""
        width, parts = rollouts.completion_mask.shape[1], self._loss_gradients
        padded = [torch.nn.functional.pad(part, (0, width - part.shape[1])) for part in parts]
        parts.clear()
        return torch.cat(padded) / -accelerator.num_processes

    def _contributions(
        self,
        update: UpdateContext,
        engine: Engine,
        rollouts: RolloutBatch,
        coefficients: Float[Tensor, "B T"],
        direction: dict[str, Tensor],
        temperature: float,
    ) -> tuple[Float[Tensor, "B K"], Int[Tensor, "B K"] | None]:
        """delta_i (K = 1) or delta_ik, and with the latter which tokens are common (1) and not rare (0). Local."""
        completions, params = Completions.of(rollouts), update.params_before
        with (
            rank_symmetric(engine.accelerator, "attributing the entropy change to the step's completions"),
            engine.scoring_model(params) as model,
        ):
            if self.mode == "sequence":
                products = gradient_products(
                    model, completions, -coefficients, direction, temperature, self.batch_size
                )
                result = completion_contributions(products, 1.0).unsqueeze(1), None
            else:
                scores = score(model, completions, temperature, self.batch_size, params, direction, order=1)
                mask = completions.completion_mask
                contributions = token_contributions(coefficients, scores.logps[1], mask, 1.0)
                result = contributions, bin_index(scores.logps[0], [math.log(RARE)])
        return result

    def _add_to_record(
        self,
        contributions: Float[Tensor, "B K"],
        common: Int[Tensor, "B K"] | None,
        rollouts: RolloutBatch,
        accelerator: Accelerator,
    ) -> None:
        """Pool the step's sums by category; completions without advantage belong to none. Collective."""
        prompts = accelerator.gather(rollouts.prompt_index).unique()
        position = torch.searchsorted(prompts, rollouts.prompt_index)
        advantages = rollouts.raw_advantages.unsqueeze(1)
        categories, mask = (advantages <= 0).long().expand(contributions.shape), advantages != 0
        if common is not None:
            categories, mask = crossed(categories, common, 2), mask & rollouts.completion_mask.bool()
        sums, counts = category_sums(
            contributions, categories, mask.expand(contributions.shape), position, len(prompts), len(self.record.names)
        )
        sums, counts = (accelerator.reduce(part, reduction="sum") for part in (sums, counts))
        self.record = self.record.update(sums, counts)

    def _pooled(self) -> dict[str, float]:
        """Each category's share of the change that all completions made over the run, and of their tokens."""
        logged: dict[str, float] = {}
        for name in self.record.names:
            low, high = self.record.share_interval(name)
            key = f"entropy/share_{name}"
            logged |= {key: self.record.share(name).value, f"{key}_low": low, f"{key}_high": high}
            logged[f"entropy/token_share_{name}"] = self.record.token_share(name)
        return logged

    def _write(self, trainer: Any, rollouts: RolloutBatch, contributions: Tensor, coefficients: Tensor) -> None:
        """`probes/attribution/step_*.safetensors`, rows and columns as in that of the rollouts."""
        tensors = {
            "completion_mask": rollouts.completion_mask,
            "prompt_index": rollouts.prompt_index,
            "loss_coefficients": coefficients,
            "attribution": contributions if self.mode == "token" else contributions.squeeze(1),
        }
        trainer.write_probe_file(self.name, trainer.step, tensors)


def _logged(attribution: Attribution) -> dict[str, float]:
    parts = {name: getattr(attribution, name) for name in ("momentum", "weight_decay", "gradient")}
    return {
        **{f"entropy/delta_{name}": value for name, value in parts.items()},
        **{f"entropy/share_{name}": attribution.share(value) for name, value in parts.items()},
        "entropy/attribution_rounding": attribution.relative_rounding,
    }
