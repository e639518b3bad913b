"""The machine for which a run is checked: this one, or one that is given by its name ("2xH100-80GB")."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

import torch

from trl_entropy.gradients.memory import main_memory

GIB = 2**30
_NAMED = re.compile(r"(\d+)\s*x\s*([A-Za-z]\w*)[\s-]+(\d+)\s*GB", re.IGNORECASE)


@dataclass(frozen=True)
class Hardware:
    """
    The devices of one machine.

    Attributes:
        num_devices: number of GPUs; 0 on a machine without any.
        memory: bytes of each GPU; without a GPU the bytes of the machine, which its processes share.
        is_this_machine: whether the packages, the files and the disk of this machine are those of the run.
    """

    name: str
    num_devices: int
    memory: int
    is_this_machine: bool

    @property
    def has_gpu(self) -> bool:
        return self.num_devices > 0

    def memory_per_process(self, num_processes: int) -> float:
        """The bytes that each of `num_processes` on this machine can use."""
        return self.memory if self.has_gpu else self.memory / num_processes

    def __str__(self) -> str:
        where = "this machine" if self.is_this_machine else "given by --hardware"
        return f"{self.name}, {self.memory / GIB:.1f} GiB{' each' if self.num_devices > 1 else ''} ({where})"


def named_hardware(text: str) -> Hardware:
    """
    The machine that `text` describes: `2xH100-80GB` (the GPUs of *one* machine) or `cpu-16GB`.

    A GPU of "80 GB" has at least 80e9 bytes, and counts as that.

    Raises:
        ValueError: when the text has another form.
    """
    if found := _NAMED.fullmatch(text.strip()):
        number, name, gigabytes = found.groups()
        return Hardware(f"{number} x {name} {gigabytes} GB", int(number), int(gigabytes) * 10**9, False)
    if found := re.fullmatch(r"cpu-(\d+)\s*GB", text.strip(), re.IGNORECASE):
        return Hardware("CPU", 0, int(found[1]) * 10**9, False)
    raise ValueError(f"--hardware {text!r} is not understood; write 2xH100-80GB or cpu-16GB.")


def this_machine(use_cpu: bool = False) -> Hardware:
    """This machine: its visible GPUs, or without one its CPU and memory."""
    if torch.cuda.is_available() and not use_cpu:
        number = torch.cuda.device_count()
        # Not `mem_get_info`, which would leave a context of this process on every GPU.
        memory = min(torch.cuda.get_device_properties(device).total_memory for device in range(number))
        return Hardware(f"{number} x {torch.cuda.get_device_name(0)}", number, memory, True)
    return Hardware(f"CPU, {os.cpu_count()} cores", 0, main_memory(), True)
