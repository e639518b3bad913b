"""The machine that a run is checked for: this one, or one that is only named ("2xH100-80GB")."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

import torch

GIB = 2**30
_NAMED = re.compile(r"(\d+)\s*x\s*([A-Za-z]\w*)[\s-]+(\d+)\s*GB", re.IGNORECASE)
_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


@dataclass(frozen=True)
class Hardware:
    """
    Devices of one machine.

    Attributes:
        num_devices: GPUs; 0 on a machine that has none.
        memory: bytes of each GPU; without GPU those of the machine, which its processes share.
        is_this_machine: whether packages, files and the disk that we see here are those of the run.
    """

    name: str
    num_devices: int
    memory: int
    is_this_machine: bool

    @property
    def has_gpu(self) -> bool:
        return self.num_devices > 0

    def memory_per_process(self, num_processes: int) -> float:
        """Bytes that each of `num_processes` on this machine may use."""
        return self.memory if self.has_gpu else self.memory / num_processes

    def __str__(self) -> str:
        where = "this machine" if self.is_this_machine else "as --hardware says"
        return f"{self.name}, {self.memory / GIB:.1f} GiB{' each' if self.num_devices > 1 else ''} ({where})"


def named_hardware(text: str) -> Hardware:
    """
    The machine that `text` names: `2xH100-80GB` (GPUs of *one* machine), `cpu-16GB`.

    A GPU of "80 GB" has at least 80e9 bytes; that is what is counted.

    Raises:
        ValueError: when the text names none.
    """
    if found := _NAMED.fullmatch(text.strip()):
        number, name, gigabytes = found.groups()
        return Hardware(f"{number} x {name} {gigabytes} GB", int(number), int(gigabytes) * 10**9, False)
    if found := re.fullmatch(r"cpu-(\d+)\s*GB", text.strip(), re.IGNORECASE):
        return Hardware("CPU", 0, int(found[1]) * 10**9, False)
    raise ValueError(f"--hardware {text!r} is not understood; write 2xH100-80GB or cpu-16GB.")


def this_machine(use_cpu: bool = False) -> Hardware:
    """The GPUs that are visible here, or else the machine's memory."""
    if torch.cuda.is_available() and not use_cpu:
        number = torch.cuda.device_count()
        # Not `mem_get_info`, which would leave a context of this process on every GPU.
        memory = min(torch.cuda.get_device_properties(device).total_memory for device in range(number))
        return Hardware(f"{number} x {torch.cuda.get_device_name(0)}", number, memory, True)
    return Hardware(f"CPU, {os.cpu_count()} cores", 0, _main_memory(), True)


def _main_memory() -> int:
    """Bytes of the machine, or of the container that limits this process."""
    installed = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = _CGROUP_LIMIT.read_text().strip() if _CGROUP_LIMIT.exists() else "max"
    return installed if limit == "max" else min(installed, int(limit))
