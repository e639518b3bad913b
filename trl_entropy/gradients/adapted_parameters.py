"""Adapters on parameters instead of layers, such as LoRA on the experts of a mixture, in forward mode."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from trl_entropy.engine.strict_float32 import patched


@contextlib.contextmanager
def adapted_parameters(model: nn.Module) -> Iterator[None]:
    """
    Inside, peft's adapters of `target_parameters` put the adapted weight where the layer reads it. peft itself does it
    by a parametrization, which writes into the parameter in place (`aten::set_`): that has no derivative.

    Written against peft 0.21: `ParamWrapper._activate_lora`.
    """
    with contextlib.ExitStack() as undo:
        for wrapper in parameter_adapters(model):
            patched(undo, wrapper, "_activate_lora", _activate(wrapper))
        yield


def parameter_adapters(model: nn.Module) -> list[Any]:
    """The modules of peft that adapt a parameter of the layer inside."""
    return [one for one in model.modules() if hasattr(one, "parameter_name") and hasattr(one, "_activate_lora")]


def _activate(wrapper: Any) -> Callable[[list[str]], contextlib.AbstractContextManager[None]]:
    @contextlib.contextmanager
    def activate(active_adapters: list[str]) -> Iterator[None]:
        adapted = wrapper.get_param()
        for adapter in active_adapters:
            if adapter in wrapper.lora_A:
                adapted = adapted + wrapper.get_delta_weight(adapter)
        table = wrapper.get_base_layer()._parameters
        kept = table[wrapper.parameter_name]
        table[wrapper.parameter_name] = adapted
        try:
            yield
        finally:
            table[wrapper.parameter_name] = kept

    return activate
