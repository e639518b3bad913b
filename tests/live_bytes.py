"""`LiveBytes`: what the tensors that operations return take, while a block runs."""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """
    Most bytes alive at a time in tensors that operations inside returned, and the largest of these tensors.

    What a kernel allocates for itself and frees again is not seen; nor are tensors from before, nor views of them, nor
    zeros without memory, which torch makes for derivatives.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = self.largest = 0
        self.alive: dict[int, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {storage._cdata: storage.nbytes() for storage in map(_storage, tensors((args, kwargs)))}
        out = func(*args, **(kwargs or {}))
        for tensor in tensors(out):
            storage = _storage(tensor)
            if tensor._is_zerotensor():
                continue
            if storage._cdata not in self.alive and given.get(storage._cdata) != storage.nbytes():
                self._count(storage, tensor, func)
        return out

    def _count(self, storage: torch.UntypedStorage, tensor: torch.Tensor, func: object) -> None:
        """A new memory, of which `func` returned `tensor`."""
        self.alive[storage._cdata] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak, self.largest = max(self.peak, self.now), max(self.largest, storage.nbytes())
        weakref.finalize(storage, self._free, storage._cdata)

    def _free(self, key: int) -> None:
        self.now -= self.alive.pop(key, 0)


def tensors(tree: object) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _storage(tensor: torch.Tensor) -> torch.UntypedStorage:
    return tensor.untyped_storage()
