"""Scores as a function of a model's trained parameters, and its derivatives along a direction in forward mode."""

from __future__ import annotations

import abc
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd import forward_ad

from trl_entropy.engine.machine_memory import MachineTensors
from trl_entropy.engine.read_when_used import Reader, read_when_used

Params = Mapping[str, Float[Tensor, "..."]]
# (values of the parameters by name, to call the model with) -> tensors
Scorer = Callable[[dict[str, Tensor]], tuple[Tensor, ...]]


class MovingParameters(abc.ABC):
    """The parameters that a model is scored with, and where they move to: params + t direction, at t = 0."""

    def __init__(self, model: nn.Module, params: Params, direction: Params | None, order: int) -> None:
        self.model, self.params, self.direction, self.order = model, params, direction, order

    @staticmethod
    def of(model: nn.Module, params: Params | None, direction: Params | None, order: int) -> MovingParameters:
        """
        Args:
            params: trained parameters, None for the model's own. Where they lie in the machine's memory, each comes
                to the device with its direction when a layer computes with it, and leaves it afterwards.
            direction: by the same names; needed for an order above 0.
            order: derivatives to take, 0 to 2.
        """
        if isinstance(params, MachineTensors):
            return _ReadWhenUsed(model, params, direction, order)
        if params is None:
            # Without a derivative the model's own need not be named
            params = {name: p for name, p in model.named_parameters() if p.requires_grad and order}
        return _Given(model, {name: value.detach() for name, value in params.items()}, direction, order)

    @property
    def names(self) -> Collection[str]:
        """Of the parameters that move."""
        return self.params.keys()

    def in_model(self) -> AbstractContextManager[None]:
        """To be entered around all calls of `derivatives`."""
        return nullcontext()

    @abc.abstractmethod
    def derivatives(self, function: Scorer) -> tuple[Tensor, ...]:
        """Values of `function` and its first `order` derivatives in t, flat: (f, g, f', g', ...)."""


class _Given(MovingParameters):
    def derivatives(self, function: Scorer) -> tuple[Tensor, ...]:
        if self.direction is None or self.order == 0:
            return function(dict(self.params))
        params, tangents = dict(self.params), {name: self.direction[name] for name in self.params}
        return _derivatives(function, params, tangents, self.order)


class _ReadWhenUsed(MovingParameters):
    """The function is one of t, inside which each layer reads its own params + t direction."""

    def __init__(self, model: nn.Module, params: Params, direction: Params | None, order: int) -> None:
        super().__init__(model, params, direction, order)
        self._t: Tensor | None = None

    @contextmanager
    def in_model(self) -> Iterator[None]:
        readers = {id(p): self._reader(name) for name, p in self.model.named_parameters() if name in self.params}
        with read_when_used(self.model, readers):
            yield

    def _reader(self, name: str) -> Reader:
        def read() -> Tensor:
            value = self.params[name]
            if self._t is None or self.direction is None:
                return value
            if self.order == 1:  # as `torch.func.jvp` does with its arguments; no copy
                return forward_ad.make_dual(value, self.direction[name])
            return _Along.apply(self._t, (value, self.direction[name]))

        return read

    def derivatives(self, function: Scorer) -> tuple[Tensor, ...]:
        if self.direction is None or self.order == 0:
            return function({})

        def at(t: Tensor) -> tuple[Tensor, ...]:
            self._t, before = t, self._t
            try:
                return function({})
            finally:
                self._t = before

        device = next(iter(self.params.values())).device
        return _derivatives(at, torch.zeros((), device=device), torch.ones((), device=device), self.order)


class _Along(torch.autograd.Function):
    """
    value + t direction at t = 0, whose derivative is `direction` and whose second one is zero, without any memory: by
    torch's rules the sum is six tensors of that size.
    """

    @staticmethod
    def forward(t: Tensor, line: tuple[Tensor, Tensor]) -> Tensor:
        return line[0]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.direction = inputs[1][1]
        ctx.set_materialize_grads(False)

    @staticmethod
    def jvp(ctx: Any, dt: Tensor | None, line: None) -> Tensor | None:
        return None if dt is None else ctx.direction  # dt is 1


def _derivatives(function: Callable, point: object, tangent: object, order: int) -> tuple[Tensor, ...]:
    if order == 1:
        values, slopes = torch.func.jvp(function, (point,), (tangent,))
        return (*values, *slopes)

    def with_slopes(point: object) -> tuple[Tensor, ...]:
        values, slopes = torch.func.jvp(function, (point,), (tangent,))
        return (*values, *slopes)

    first, second = torch.func.jvp(with_slopes, (point,), (tangent,))
    return (*first, *second[2:])
