"""How often the host waits for the device: what would, on a GPU, read a tensor's values, counted on a CPU."""

import sys
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import trl_entropy

PACKAGE = str(Path(trl_entropy.__file__).parent)
# Operations whose result's size, or whose value in Python, depends on what is in the tensor.
READING = {"_local_scalar_dense", "bincount", "equal", "is_nonzero", "masked_select", "nonzero", "nonzero_static"}
READING |= {"_unique2", "unique_dim", "unique_consecutive"}
METHODS = ("cpu", "tolist", "numpy")
AROUND_TRL = "rollouts/user_functions.py"  # calls what TRL does in a step, and reads nothing itself


class HostReads(TorchDispatchMode):
    """
    Counts, while it is active, what makes the host wait, by probe.

    Tensors that would be on the CPU under training on a GPU count too, so that the numbers are upper bounds.

    Attributes:
        probe: whose event is being sent, if any.
        reads: by probe, or by "hooks" outside of events; "trainer" for what TRL and transformers read.
        lines: the same by line, to see where they come from.
        moves: calls of `Tensor.to` with a device, by folder of the package. Here they do nothing; on a GPU they copy
            what is not there yet, and the host waits.
    """

    def __init__(self, monkeypatch) -> None:
        super().__init__()
        self.probe, self.reads, self.moves, self.lines = "", Counter(), Counter(), Counter()
        self._paused = False
        for name in METHODS:
            self._count_calls(monkeypatch, name)
        own_to = Tensor.to

        def to(tensor, *args, **kwargs):
            if any(isinstance(value, torch.device | str) for value in (*args[:1], kwargs.get("device"))):
                self.moves[self._owner()[1].split("/")[0]] += 1
            return own_to(tensor, *args, **kwargs)

        monkeypatch.setattr(Tensor, "to", to)

    def _count_calls(self, monkeypatch, name: str) -> None:
        original = getattr(Tensor, name)

        def method(tensor, *args, **kwargs):
            self._note(name)
            paused, self._paused = self._paused, True  # what it does inside is part of the one read
            try:
                return original(tensor, *args, **kwargs)
            finally:
                self._paused = paused

        monkeypatch.setattr(Tensor, name, method)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.split("::")[1]
        if name in READING or (name.startswith(("index", "_index")) and _by_mask(args[1:])):
            self._note(name)
        return func(*args, **(kwargs or {}))

    def _note(self, operation: str) -> None:
        if not self._paused:
            owner, line = self._owner()
            self.reads[owner] += 1
            self.lines[f"{owner} {line} {operation}"] += 1

    def _owner(self) -> tuple[str, str]:
        """Whose read it is, and the innermost line of the package."""
        frame = sys._getframe(2)
        while frame is not None and not frame.f_code.co_filename.startswith(PACKAGE):
            frame = frame.f_back
        if frame is None:
            return "trainer", ""
        path = Path(frame.f_code.co_filename).relative_to(PACKAGE)
        of_trl = path.parts[0] == "trainer" or path.as_posix() == AROUND_TRL
        return "trainer" if of_trl else self.probe or "hooks", f"{path}:{frame.f_lineno}"


def _by_mask(arguments: object) -> bool:
    return any(isinstance(one, Tensor) and one.dtype in (torch.bool, torch.uint8) for one in tree_leaves(arguments))
