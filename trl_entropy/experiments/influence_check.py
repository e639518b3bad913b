"""Attribution checked by brute force: the true entropy change with one completion's gradient left out of the step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TypedDict

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm

from trl_entropy.engine.optimizer_step import adamw_settings
from trl_entropy.estimators.entropy_change.delta_entropy import RatioTerms, entropy_terms
from trl_entropy.estimators.optimizer.adamw import adamw_update, gradient_metric
from trl_entropy.estimators.rows.row_sums import Rows
from trl_entropy.estimators.statistics.importance import importance_weights
from trl_entropy.experiments.redraws import Cache
from trl_entropy.experiments.state import FixedState
from trl_entropy.gradients.float64_reference import float64_reference
from trl_entropy.gradients.scores import TokenScores, score
from trl_entropy.gradients.sequence_products import consumed, entropy_gradient, weighted_logps
from trl_entropy.rollouts.completions import Completions

SCALE = 0.01  # of the learning rate: short enough for first order, far above float64's rounding
_NUM_PROBE = 128  # completions of E; attribution and true change use the same, so that more would gain nothing
ByName = dict[str, Tensor]


class Agreement(TypedDict):
    """True changes, nats per token, with their correlation with the attributions and their slope on them."""

    correlation: float
    slope: float
    true: list[float]


class Check(TypedDict):
    """Attributions, nats per token, and true changes: with M and the clip factor held fixed, and as AdamW steps."""

    num_left_out: int
    scale: float
    attribution: list[float]
    held: Agreement
    free: Agreement


class Float64Step:
    """
    The step of a state in float64 at `SCALE` times its learning rate, from the loss gradients of U's completions.

    For use inside `float64_reference(state.model)` only.

    Attributes:
        rows: the gradient g_u of every completion, by parameter name.
        gradient: their sum, by parameter name.
    """

    def __init__(self, state: FixedState, batch_size: int) -> None:
        self.context, self.max_norm = state.context, state.args.max_grad_norm
        self.before = {name: value.double() for name, value in state.before.items()}
        self.settings = {n: replace(s, lr=SCALE * s.lr) for n, s in adamw_settings(state.context).items()}
        batch = Completions.of(state.rollouts)
        consumer = consumed(
            state.model,
            batch,
            weighted_logps(-state.loss_coefficients),
            partial(Rows, len(batch), dtype=torch.float64),
            state.args.temperature,
            batch_size,
        )
        shapes = {name: value.shape for name, value in self.before.items()}
        self.rows = {n: consumer.values[:, c].unflatten(1, shapes[n]) for n, c in consumer.columns.items()}
        self.gradient = {name: rows.sum(0) for name, rows in self.rows.items()}

    def clip_factor(self, gradient: ByName) -> float:
        norm = torch.stack([value.norm() for value in gradient.values()]).norm()
        return min(1.0, self.max_norm / (float(norm) + 1e-6)) if self.max_norm else 1.0

    def params_after(self, gradient: ByName) -> ByName:
        """theta after AdamW's step with this gradient, from which M and the clip factor follow."""
        clip, step = self.clip_factor(gradient), self.context.optimizer_step
        return {
            name: value + adamw_update(value, gradient[name], *self._moments(name), step, self.settings[name], clip)
            for name, value in self.before.items()
        }

    def metric(self) -> ByName:
        """lr c (1-b1)/(1-b1^t) M of the step with all completions."""
        clip, step = self.clip_factor(self.gradient), self.context.optimizer_step
        return {
            name: gradient_metric(value, self._moments(name)[1], step, self.settings[name], clip)
            for name, value in self.gradient.items()
        }

    def _moments(self, name: str) -> tuple[Tensor, Tensor]:
        return self.context.exp_avg[name].double(), self.context.exp_avg_sq[name].double()


def check_by_leaving_out(
    state: FixedState, cache: Cache, probe: Completions, num_left_out: int, batch_size: int
) -> Check:
    """
    Attributions (T9) and true entropy changes (T6) on the same probe completions, nats per token, in float64.

    The true change is the entropy change of the whole step less that of the step without the completion. The step
    without it is made in two ways: `held`, with M and the clip factor of the whole step, as (T9) takes them, and
    `free`, with those that AdamW would have without the completion.
    """
    probe = probe.rows(torch.arange(min(_NUM_PROBE, len(probe))))
    chosen = left_out(state.rollouts.raw_advantages, num_left_out)
    name = f"left-out-{len(chosen)}-{len(probe)}"
    found = cache.get(name, lambda: _attribution_and_truth(state, probe, chosen, batch_size))
    attribution, held, free = found.unbind(0)
    return {
        "num_left_out": len(chosen),
        "scale": SCALE,
        "attribution": attribution.tolist(),
        "held": _agreement(attribution, held),
        "free": _agreement(attribution, free),
    }


def left_out(advantages: Float[Tensor, " B"], number: int) -> Int[Tensor, " n"]:
    """The first `number` completions that have a gradient."""
    return advantages.nonzero().squeeze(1)[:number]


def _attribution_and_truth(
    state: FixedState, probe: Completions, chosen: Int[Tensor, " n"], batch_size: int
) -> Float[Tensor, "3 n"]:
    with float64_reference(state.model):
        step = Float64Step(state, batch_size)
        change = _entropy_change(state, probe, step.before, batch_size)
        gradient = _entropy_gradient(state, probe, step.before, batch_size)
        metric, whole = step.metric(), step.params_after(step.gradient)
        of_whole = change(whole)
        values = []
        for u in tqdm(chosen.tolist(), desc="left out", unit="completion", mininterval=1.0):
            own = {name: rows[u] for name, rows in step.rows.items()}
            held = {name: value + metric[name] * own[name] for name, value in whole.items()}
            free = step.params_after({name: value - own[name] for name, value in step.gradient.items()})
            attributed = -sum(float((gradient[name] * metric[name] * own[name]).sum()) for name in own)
            values.append([attributed, of_whole - change(held), of_whole - change(free)])
    return torch.tensor(values, dtype=torch.float64).T.contiguous()


def _entropy_change(
    state: FixedState, probe: Completions, before: ByName, batch_size: int
) -> Callable[[ByName], float]:
    """The function that gives, for parameters, the entropy (T6) on E less the entropy at `before`."""

    def scored(params: ByName) -> TokenScores:
        return score(state.model, probe, state.args.temperature, batch_size, params)

    start, mask = scored(before), probe.loss_mask

    def entropy(scores: TokenScores) -> Tensor:
        weights = importance_weights(scores.logps[0], start.logps[0], mask)
        terms = RatioTerms(*entropy_terms(scores.entropy[0], weights, mask))
        return terms.numerator.sum() / terms.denominator.sum()

    at_start = entropy(start)
    return lambda params: float(entropy(scored(params)) - at_start)


def _entropy_gradient(state: FixedState, probe: Completions, before: ByName, batch_size: int) -> ByName:
    """grad h on E at `before`."""
    num_tokens, temperature = float(probe.lengths.sum()), state.args.temperature
    scores = score(state.model, probe, temperature, batch_size, before)
    entropy = float(scores.entropy[0].sum()) / num_tokens
    return entropy_gradient(state.model, probe, temperature, batch_size, entropy, num_tokens)


def _agreement(attribution: Float[Tensor, " n"], truth: Float[Tensor, " n"]) -> Agreement:
    centred = attribution - attribution.mean()
    correlation = torch.corrcoef(torch.stack([attribution, truth]))[0, 1]
    slope = (centred * truth).sum() / centred.square().sum()
    return {"correlation": float(correlation), "slope": float(slope), "true": truth.tolist()}
