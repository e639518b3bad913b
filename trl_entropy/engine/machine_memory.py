"""
Whole tensors that exist once on a machine, in main memory that its processes share, and on a device one at a time.

Where parameters are spread over processes, a whole copy on every device would take the memory that this has saved.
Passes of probes are local: their number differs between processes, and one of them may fail alone. So nothing can be
gathered while they run. Instead everything is gathered beforehand, a bucket at a time, and a process reads what a
layer needs when the layer computes.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterable, Iterator, Mapping

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from jaxtyping import UInt8
from torch import Tensor

logger = logging.getLogger(__name__)

_ALIGNMENT = 64  # bytes at which each tensor begins


class MachineTensors(Mapping[str, Tensor]):
    """
    Tensors by name. Each reading of one gives it on the device: a copy of its own on an accelerator, and on a CPU the
    memory that all processes of the machine share, so do not write into it.

    Args:
        sizes: shape and dtype of each, in the order in which they lie in memory.
        parts: the tensors on this process, some at a time, each of the machine's processes the same. Consumed here.
        accelerator: of the run.

    Collective, and so is what `parts` may gather.
    """

    def __init__(
        self,
        sizes: Mapping[str, tuple[torch.Size, torch.dtype]],
        parts: Iterable[Mapping[str, Tensor]],
        accelerator: Accelerator,
    ) -> None:
        self.device = accelerator.device
        numbers = {name: shape.numel() * dtype.itemsize for name, (shape, dtype) in sizes.items()}
        bytes_of_all, writes = shared_memory(sum(map(_aligned, numbers.values())), accelerator)
        memory = bytes_of_all.untyped_storage()
        self._held: dict[str, Tensor] = {}
        start = 0
        for name, (shape, dtype) in sizes.items():
            # No view, which a `torch.autograd.Function` may not return
            self._held[name] = torch.empty(0, dtype=dtype).set_(memory, start // dtype.itemsize, shape)
            start += _aligned(numbers[name])
        for part in parts:
            if writes:
                self._write(part)
            del part  # else it stays until the next has been gathered
        accelerator.wait_for_everyone()  # only now has the process that writes written everything

    def _write(self, part: Mapping[str, Tensor]) -> None:
        for name, value in part.items():
            self._held[name].copy_(value)

    def __getitem__(self, name: str) -> Tensor:
        held = self._held[name]
        # DeepSpeed's CPU is `cpu:0`, to which torch copies from `cpu`
        return held if self.device.type == "cpu" else held.to(self.device)

    def __contains__(self, name: object) -> bool:
        return name in self._held  # `Mapping` reads the tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._held)

    def __len__(self) -> int:
        return len(self._held)

    def shape(self, name: str) -> torch.Size:
        """Without reading the tensor."""
        return self._held[name].shape

    @property
    def num_bytes(self) -> int:
        """That the machine holds, whatever its number of processes."""
        return sum(_aligned(held.numel() * held.itemsize) for held in self._held.values())


def _aligned(number: int) -> int:
    return math.ceil(number / _ALIGNMENT) * _ALIGNMENT


def shared_memory(num_bytes: int, accelerator: Accelerator) -> tuple[UInt8[Tensor, " N"], bool]:
    """
    Memory of zeros that all processes of this machine see, and whether this one is to write into it. Collective.

    Not in /dev/shm, which containers limit to 64 MB: a file without a name, that the processes open by way of /proc
    and that is gone with the last tensor that lies in it. A process that may not open it takes memory of its own, says
    so and writes itself.
    """
    own = os.memfd_create("trl_entropy") if accelerator.is_local_main_process else -1
    if own >= 0:
        os.ftruncate(own, num_bytes)
    places = gather_object([(os.getpid(), own)])
    process, number = places[accelerator.process_index - accelerator.local_process_index]
    path = f"/proc/{process}/fd/{number}"
    try:
        memory, writes = torch.from_file(path, shared=True, size=num_bytes, dtype=torch.uint8), own >= 0
    except RuntimeError as error:
        logger.warning("%s cannot be shared between processes, so that each holds its own copy: %s", path, error)
        memory, writes = torch.zeros(num_bytes, dtype=torch.uint8), True
    accelerator.wait_for_everyone()  # every process has opened it
    if own >= 0:
        os.close(own)
    return memory, writes
