"""Parameters of a model that are made when a module reads them, and freed when it has used them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

Reader = Callable[[], Tensor]


class _Table(dict[str, Any]):
    """
    A module's table of parameters, in which some are made when they are read by name.

    Whoever goes through the whole table, as `named_parameters` does, sees what stands in their places; so does who has
    put another tensor there, until it is taken out again. As DeepSpeed's `ZeROOrderedDict`, which gathers so.
    """

    def __init__(self, table: Mapping[str, Any], readers: Mapping[int, Reader]) -> None:
        super().__init__(table)
        self._readers: dict[int, Reader] = {**getattr(table, "_readers", {}), **readers}

    def __getitem__(self, key: str) -> Any:
        found = super().__getitem__(key)
        reader = self._readers.get(id(found))
        return found if reader is None else reader()


@contextmanager
def read_when_used(model: nn.Module, readers: Mapping[int, Reader]) -> Iterator[None]:
    """
    Lets the modules of `model` compute with `readers[id(parameter)]()` in place of a parameter, made anew whenever a
    module reads it. Afterwards, always, all is as it was.
    """
    tables = [(module, module._parameters) for module in model.modules()]
    try:
        for module, table in tables:
            if any(id(param) in readers for param in table.values()):
                vars(module)["_parameters"] = _Table(table, readers)
        yield
    finally:
        for module, table in tables:
            vars(module)["_parameters"] = table


class Remade:
    """
    Lets the graph of a backward pass keep where copies come from instead of the copies: they are made again when the
    pass needs them.
    """

    def __init__(self) -> None:
        self._alive: WeakValueDictionary[int, Tensor] = WeakValueDictionary()
        self._readers: dict[int, Reader] = {}

    def reader(self, read: Reader) -> Reader:
        """`read`, whose results are told from other tensors."""

        def remembered() -> Tensor:
            made = read()
            # Part of a larger memory is no copy
            if not _in_torch_func() and made.untyped_storage().nbytes() == made.nbytes:
                self._alive[made.data_ptr()], self._readers[made.data_ptr()] = made, read
            return made

        return remembered

    @contextmanager
    def in_forward_of(self, model: nn.Module) -> Iterator[None]:
        """
        Where `model` computes with a graph. Not around the backward pass, in which `torch.func` takes derivatives of
        single modules and allows no hooks.
        """
        entered: list[saved_tensors_hooks] = []

        def begin(*_: object) -> None:
            hooks = saved_tensors_hooks(self._pack, self._unpack)
            if torch.is_grad_enabled() and not _in_torch_func():
                hooks.__enter__()
                entered.append(hooks)

        def end(*_: object) -> None:
            if entered:
                entered.pop().__exit__()

        handles = [model.register_forward_pre_hook(begin), model.register_forward_hook(end, always_call=True)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _pack(self, tensor: Tensor) -> Any:
        place = tensor.untyped_storage().data_ptr()
        if self._alive.get(place) is None:
            return tensor
        return self._readers[place], tensor.size(), tensor.stride(), tensor.storage_offset()

    def _unpack(self, packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        read, *view = packed
        return read().as_strided(*view)


def _in_torch_func() -> bool:
    """Whether tensors are wrappers now, which have no storage; they keep nothing for a backward pass here."""
    try:
        torch.empty(0).untyped_storage()
    except NotImplementedError:
        return True
    return False
