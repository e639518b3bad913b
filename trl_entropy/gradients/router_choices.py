"""Which experts the routers of a mixture choose for each token of scored completions."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

# transformers' name of what a router gives, in a model's table of the modules whose outputs can be recorded.
ROUTER_OUTPUT = "router_logits"


def routers_of(model: nn.Module) -> list[nn.Module]:
    """The modules by which transformers records the logits of a mixture's routers, in their order; none if dense."""
    tables = [getattr(type(module), "_can_record_outputs", None) or {} for module in model.modules()]
    listed = [table[ROUTER_OUTPUT] for table in tables if ROUTER_OUTPUT in table]
    specs = [one for spec in listed for one in (spec if isinstance(spec, list) else [spec])]
    classes = tuple(dict.fromkeys(kind for spec in specs if (kind := getattr(spec, "target_class", spec)) is not None))
    return [module for module in model.modules() if isinstance(module, classes)]


class RouterChoices:
    """
    The experts that each router chose in the calls of a model inside [`watch`]: of its last call, as that is the one
    that reads the completions, after any on a few tokens to try the model and any that reads the prompts.
    """

    def __init__(self, model: nn.Module) -> None:
        self._routers = routers_of(model)
        self._last: dict[int, Int[Tensor, "tokens k"]] = {}

    @contextlib.contextmanager
    def watch(self) -> Iterator[None]:
        with contextlib.ExitStack() as undo:
            for place, router in enumerate(self._routers):
                handle = router.register_forward_hook(self._hook(place))
                undo.callback(handle.remove)
            yield

    def take(self, num_rows: int, width: int) -> Int[Tensor, "B T L k"] | None:
        """
        The sets, in ascending order, of the last `width` columns of the call; None if no router says what it chose.

        Args:
            num_rows: rows that the model was called with.
            width: columns of the completions.
        """
        found, self._last = [self._last[place] for place in sorted(self._last)], {}
        if not found or len({one.shape for one in found}) > 1 or found[0].shape[0] % num_rows:
            return None
        by_column = [one.sort(dim=-1).values.view(num_rows, -1, one.shape[-1])[:, -width:] for one in found]
        return torch.stack(by_column, dim=2).to(torch.int16)

    def _hook(self, place: int) -> Any:
        def keep(module: nn.Module, inputs: Any, output: Any) -> None:
            parts = output if isinstance(output, tuple) else ()
            for part in parts:
                if isinstance(part, Tensor) and part.ndim == 2 and not part.is_floating_point():
                    self._last[place] = _without_tangent(part)

        return keep


def _without_tangent(tensor: Tensor) -> Tensor:
    """The integers themselves: in forward mode torch hands out a wrapper that must not outlive the call."""
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor.detach()
