"""
Whether the rows that hooks on the layers give are each sequence's own gradient: compared on a few tokens with one
backward pass for each sequence. A layer whose rows are not is split by sequence together with the module around it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from trl_entropy.engine.parameters import trainable_parameters
from trl_entropy.estimators.rows.row_gradients import RowGradients
from trl_entropy.estimators.rows.row_sums import Consumer
from trl_entropy.gradients.layer_rules import LayerError, make_unit, trained_layers
from trl_entropy.gradients.sequence_products import consumed, gradient_of, weighted_logps
from trl_entropy.rollouts.completions import Completions

# Relative difference of a parameter's rows from the oracle: by rounding, and where parameters are narrower.
_ROUNDING, _ROUNDING_NARROW = 1e-3, 0.15
# A gradient below this share of that of all parameters together is compared on that scale: that of a key's bias is
# rounding alone, of sums over all tokens.
_SMALL = 1e-3
_MOST_UNITS = 12
Sketch = dict[str, Float[Tensor, "2 R"]]


def prove_rows(model: nn.Module, completions: Completions) -> None:
    """
    Raises `ValueError` that names a layer if the gradients of these few completions cannot be told apart, after layers
    that hide what each sequence adds were made parts of a larger one. Local; leaves no `.grad`.

    Args:
        model: unwrapped, in evaluation mode.
        completions: of a few tokens each.
    """
    expected = _oracle(model, completions)
    for _ in range(_MOST_UNITS):
        wrong, reason = _wrong_layer(model, completions, expected)
        if wrong is None:
            return
        if not make_unit(model, wrong):
            break
    raise ValueError(f"the gradients of sequences cannot be told apart: {reason}")


def row_errors(model: nn.Module, completions: Completions) -> dict[str, float]:
    """By parameter, the largest error of a sequence's row relative to the norm of the parameter's gradient."""
    return _errors(_rows(model, completions), _oracle(model, completions))


def _wrong_layer(model: nn.Module, completions: Completions, expected: Sketch) -> tuple[str | None, str]:
    """The name of a layer whose rows are wrong, and what was seen; None if there is none."""
    try:
        errors = _errors(_rows(model, completions), expected)
    except LayerError as error:
        return error.layer, str(error)
    narrow = any(param.itemsize < 4 for param in trainable_parameters(model).values())
    allowed = _ROUNDING_NARROW if narrow else _ROUNDING
    worst = max(errors, key=lambda name: errors[name])
    if not errors[worst] > allowed:
        return None, ""
    layers = trained_layers(model, trainable_parameters(model))
    holder = next(layer for layer in layers if worst in layer.parameters.values())
    kind = type(holder.module).__name__
    return holder.name, f"the rows of {worst!r}, in a {kind}, are off by {errors[worst]:.2g} of its gradient"


def _rows(model: nn.Module, completions: Completions) -> Sketch:
    number, ones = len(completions), torch.ones_like(completions.completion_mask, dtype=torch.float64)
    return consumed(model, completions, weighted_logps(ones), lambda: _Sketches(number), 1.0, number).sketches


def _oracle(model: nn.Module, completions: Completions) -> Sketch:
    """By one pass over the same batch for each sequence, with its share of the loss alone."""
    columns: dict[str, list[Tensor]] = {}
    for number in range(len(completions)):
        alone = torch.zeros_like(completions.completion_mask, dtype=torch.float64)
        alone[number] = 1.0
        for name, gradient in gradient_of(model, completions, weighted_logps(alone), 1.0, len(completions)).items():
            columns.setdefault(name, []).append(_sketch(name, gradient[None]))
    return {name: torch.cat(parts, dim=1) for name, parts in columns.items()}


def _sketch(name: str, gradients: Float[Tensor, "R *shape"]) -> Float[Tensor, "2 R"]:
    """Of each row, a product with a random direction, always the same for a parameter, and the norm."""
    with _own_seed(len(name)):
        direction = torch.randn(gradients.shape[1:], dtype=torch.float32).to(gradients.device)
    wide = gradients.float().flatten(1)
    return torch.stack([wide @ direction.flatten(), wide.norm(dim=1)]).double()


@contextlib.contextmanager
def _own_seed(seed: int) -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def _errors(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, float]:
    whole = torch.stack([value[1].square().sum() for value in expected.values()]).sum().sqrt()
    errors = {}
    for name, wanted in expected.items():
        found = actual.get(name, torch.zeros_like(wanted))
        scale = torch.maximum(wanted[1].max(), _SMALL * whole)
        errors[name] = float(((found - wanted).abs().max() / scale).nan_to_num(0.0))
    return errors


class _Sketches(Consumer):
    """The sketches of each parameter's rows."""

    def __init__(self, number: int) -> None:
        self.number, self.sketches = number, dict[str, Tensor]()

    def bind(self, shapes: Mapping[str, torch.Size], device: torch.device) -> None:
        """Nothing to prepare."""

    def add(self, name: str, gradients: RowGradients, rows: Int[Tensor, " R"]) -> None:
        """One parameter's rows."""
        own = self.sketches.setdefault(name, torch.zeros(2, self.number, dtype=torch.float64, device=rows.device))
        for part, grads in gradients.chunks():
            own[:, rows[part]] = _sketch(name, grads)
