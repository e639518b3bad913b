"""
Whether what the probes compute of a model is right: two optimizer steps of a bare model on random tokens, and each
way of computing a number against another way that shares no code with it.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from trl_entropy.config.settings_file import one_line
from trl_entropy.engine.attention import scored_attention
from trl_entropy.engine.parameters import (
    evaluation_mode,
    snapshot_parameters,
    swapped_parameters,
    trainable_parameters,
)
from trl_entropy.engine.strict_float32 import fp32_strict
from trl_entropy.estimators.entropy_change.entropy import entropy_and_logps
from trl_entropy.estimators.rows.row_sums import RowTotal
from trl_entropy.gradients.inputs import base_model, model_inputs
from trl_entropy.gradients.row_proof import row_errors
from trl_entropy.gradients.scores import score
from trl_entropy.gradients.sequence_gradients import SequenceGradients
from trl_entropy.gradients.sequence_products import gradient_of, gradient_products, weighted_entropies, weighted_logps
from trl_entropy.probes.model_checks import check_derivatives, check_scoring, check_sequences
from trl_entropy.rollouts.completions import Completions

# Errors by which a number is still right: of float32, and of sums that training makes in bfloat16.
ALLOWED, ALLOWED_NARROW = 1e-3, 5e-2
_LEARNING_RATE = 1e-3
_PROMPT, _COMPLETION = 3, 4
ByName = Mapping[str, Float[Tensor, "..."]]


@dataclass(frozen=True)
class Setup:
    """How the model is trained."""

    checkpointing: bool = False
    attention: str = "sdpa"
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        name = str(self.dtype).removeprefix("torch.")
        return f"{name}, {self.attention}, checkpointing {'on' if self.checkpointing else 'off'}"


@dataclass(frozen=True)
class Outcome:
    """
    What came of a check.

    Attributes:
        error: relative; None if the check was refused.
        reason: why it was refused, or how it failed.
    """

    check: str
    error: float | None = None
    allowed: float = ALLOWED
    reason: str = ""

    @property
    def state(self) -> str:
        """`ok`, `refused` or `wrong`."""
        if self.error is None:
            return "refused" if self.reason else "wrong"
        return "ok" if self.error <= self.allowed else "wrong"

    def __str__(self) -> str:
        said = self.reason if self.error is None else f"relative error {self.error:.1e}"
        return f"{self.check:<28} {self.state:<8} {said}"


def conformance(model: nn.Module, setup: Setup) -> list[Outcome]:
    """
    The outcome of every check. Steps the model twice; its own state is not kept.

    Args:
        model: on its device, with its adapter; made by `setup`'s attention and in its dtype.
    """
    if setup.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    completions, direction = _completions(model), _two_steps(model, _completions(model))
    reasons = {check: _refusal(refuse, model) for check, refuse in _REFUSALS.items()}
    name, whole = "sum of rows, in training", functools.partial(_sum_of_rows, model, completions)
    refused = Outcome(name, reason=reasons["rows"])
    outcomes = [refused if reasons["rows"] else _outcome(name, whole, _narrow(setup))]
    for check, reason in reasons.items():
        if reason:
            outcomes += [Outcome(name, reason=reason) for name in _CHECKS[check]]
            continue
        with _as_scored(model):
            for name, error in _CHECKS[check].items():
                outcomes.append(_outcome(name, functools.partial(error, model, completions, direction)))
    return outcomes


def _narrow(setup: Setup) -> float:
    return ALLOWED if setup.dtype == torch.float32 else ALLOWED_NARROW


def _refusal(check: Callable[[nn.Module], None], model: nn.Module) -> str:
    """Why a probe refuses the model at start; empty if it does not."""
    try:
        check(model)
    except ValueError as error:
        return one_line(error)
    return ""


def _outcome(check: str, error: Callable[[], float], allowed: float = ALLOWED) -> Outcome:
    """A crash is as wrong as a number that is."""
    try:
        return Outcome(check, error(), allowed)
    except Exception as crash:
        return Outcome(f"{check}: {type(crash).__name__} {one_line(crash)[:150]}", float("inf"), allowed)


def _refuse_derivatives(model: nn.Module) -> None:
    check_derivatives(model, "it")
    check_scoring(model, "it", derivatives=True)


_REFUSALS: dict[str, Callable[[nn.Module], None]] = {
    "scores": lambda model: check_scoring(model, "it"),
    "derivatives": _refuse_derivatives,
    "rows": lambda model: check_sequences(model, "it"),
}


# ---- the model


def _completions(model: nn.Module) -> Completions:
    """Four completions of two prompts, of other lengths, with padding on both sides."""
    vocabulary = base_model(model).config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, vocabulary, (4, _PROMPT + _COMPLETION), generator=generator)
    ids[1, :_PROMPT], ids[3, :_PROMPT] = ids[0, :_PROMPT], ids[2, :_PROMPT]
    mask = torch.ones_like(ids)
    mask[2:, 0] = 0
    mask[1, -2:] = mask[3, -1:] = 0
    device = next(model.parameters()).device
    ids, mask = ids.to(device), mask.to(device)
    own = mask[:, _PROMPT:]
    return Completions(ids, mask, own, torch.tensor([0, 0, 1, 1], device=device), loss_mask=own)


def _loss(model: nn.Module, completions: Completions) -> Float[Tensor, " B"]:
    """Each completion's share."""
    logits = model(**model_inputs(model, completions)).logits[:, :-1].float()
    entropy, logps = entropy_and_logps(logits, completions.input_ids[:, -_COMPLETION:], 1.0)
    weights = torch.arange(1, len(completions) + 1, device=logps.device)[:, None]
    return ((weights * logps + entropy) * completions.loss_mask).sum(1)


def _two_steps(model: nn.Module, completions: Completions) -> ByName:
    """The change that the second step makes, float32."""
    model.train()
    params = trainable_parameters(model)
    optimizer, before = torch.optim.AdamW(params.values(), lr=_LEARNING_RATE), {}
    for _ in range(2):
        before = {name: param.detach().float().clone() for name, param in params.items()}
        _loss(model, completions).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: param.detach().float() - before[name] for name, param in params.items()}


@contextlib.contextmanager
def _as_scored(model: nn.Module) -> Iterator[None]:
    """In float32 and evaluation mode, as probes score it."""
    values = {name: value.float() for name, value in snapshot_parameters(model).items()}
    with contextlib.ExitStack() as inside:
        inside.enter_context(evaluation_mode(model))
        inside.enter_context(fp32_strict(model))
        inside.enter_context(scored_attention(model))
        inside.enter_context(swapped_parameters(model, values, torch.float32))
        yield


# ---- checks: each returns a relative error


def _sum_of_rows(model: nn.Module, completions: Completions) -> float:
    model.train()
    total = RowTotal()
    with SequenceGradients(model, total) as collector:
        loss = _loss(model, completions).sum()
        with collector.batch(torch.arange(len(completions))):
            loss.backward()
    grads = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in trainable_parameters(model).items()}
    model.zero_grad()
    missed = sum((total.by_name[name].double() - grad.double()).square().sum() for name, grad in grads.items())
    return float((missed / sum(grad.double().square().sum() for grad in grads.values())).sqrt())


def _plain(model: nn.Module, completions: Completions, direction: ByName) -> float:
    """Scores against the model's plain forward, one completion without padding at a time; nats."""
    found, errors = score(model, completions, 1.0, None), []
    for number, mask in enumerate(completions.attention_mask.bool()):
        ids, drawn = completions.input_ids[number][mask][None], int(completions.loss_mask[number].sum())
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[:, :-1]
        entropy, logps = entropy_and_logps(logits[:, -drawn:], ids[:, -drawn:], 1.0)
        errors += [(found.entropy[0][number, :drawn] - entropy[0]).abs().max()]
        errors += [(found.logps[0][number, :drawn] - logps[0]).abs().max()]
    return float(torch.stack(errors).max())


def _forward_mode(model: nn.Module, completions: Completions, direction: ByName) -> float:
    """Derivatives along the update in forward mode against the gradient's product with it."""
    slopes = score(model, completions, 1.0, None, direction=direction, order=1)
    ones, errors = torch.ones_like(completions.loss_mask, dtype=torch.float64), []
    for found, value in ((slopes.entropy[1], weighted_entropies(ones)), (slopes.logps[1], weighted_logps(ones))):
        gradient = gradient_of(model, completions, value, 1.0, None)
        errors.append(_relative(found.double().sum(), gradient, direction))
    return max(errors)


def _rows(model: nn.Module, completions: Completions, direction: ByName) -> float:
    """Each completion's gradient against a backward pass of its own."""
    return max(row_errors(model, completions).values())


def _attribution(model: nn.Module, completions: Completions, direction: ByName) -> float:
    """The sum of the completions' products with the update against that of their whole gradient."""
    value = weighted_logps(torch.ones_like(completions.loss_mask, dtype=torch.float64))
    products = gradient_products(model, completions, value, direction, 1.0, None)
    return _relative(products.sum(), gradient_of(model, completions, value, 1.0, None), direction)


def _relative(found: Tensor, gradient: ByName, direction: ByName) -> float:
    """Relative to the product, or to a hundredth of the most that it could be."""
    product = sum((gradient[name].double() * direction[name].double()).sum() for name in gradient)
    norms = [
        torch.stack([v.double().square().sum() for v in one.values()]).sum().sqrt() for one in (gradient, direction)
    ]
    return float((found - product).abs() / max(abs(float(product)), 0.01 * float(norms[0] * norms[1]), 1e-30))


_CHECKS: dict[str, dict[str, Callable[[Any, Any, Any], float]]] = {
    "scores": {"scores and plain forward": _plain},
    "derivatives": {"forward and reverse mode": _forward_mode},
    "rows": {"rows and a pass for each": _rows, "attribution and the whole": _attribution},
}
