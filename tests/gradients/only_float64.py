"""A guard that lets no floating tensor but those of float64 through."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@contextmanager
def assert_only_float64() -> Iterator[None]:
    """Raises `AssertionError` at the first operation that reads or makes a floating tensor that is not float64.

    Sees forward, backward and the recomputation of gradient checkpointing, operation by operation; not the inside of a
    fused kernel.
    """
    with _OnlyFloat64():
        yield


class _OnlyFloat64(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves((args, kwargs, out)):
            if isinstance(leaf, torch.Tensor) and (leaf.is_floating_point() or leaf.is_complex()):
                if leaf.dtype in (torch.float64, torch.complex128):
                    continue
                raise AssertionError(f"{func} touched a {leaf.dtype} tensor of shape {tuple(leaf.shape)}")
        return out
