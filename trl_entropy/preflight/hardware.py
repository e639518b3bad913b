"""
The machine for which a run is checked: this one, or one that is given by its name ("2xH100-80GB"); and what its GPUs
can do at most.

The rates in `RATES` are NVIDIA's: "A100 Tensor Core GPU" (2021), "H100 Tensor Core GPU" (2023), "H200 Tensor Core GPU"
(2024), "HGX B200" (2025), "L40S" (2023), "L4" (2023), "A10" (2021) and "T4" (2019) datasheets, and the "Ada GPU
Architecture" whitepaper (2023) for the RTX 4090. Where a sheet has rates with sparsity, they are halved here. Nothing
in this file was measured.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

import torch

GIB = 2**30
_NAMED = re.compile(r"(\d+)\s*x\s*([A-Za-z]\w*)[\s-]+(\d+)\s*GB", re.IGNORECASE)
# ASSUMPTION: the share of a peak rate that a long computation reaches, of matrix products, memory and links alike.
# Seconds are proportional to its inverse; what a probe costs in proportion to a step does not depend on it.
SHARE_OF_PEAK = 0.6
# ASSUMPTION: what a machine sends to the others, bytes a second, each way: one adapter of 400 Gbit/s.
NETWORK = 50e9
_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


@dataclass(frozen=True)
class Rates:
    """
    The peak rates of a GPU: FLOP/s of matrix products by precision, dense, and bytes per second.

    Attributes:
        float32: without tensor cores.
        tf32, bfloat16: on tensor cores; the rate of float32 where a GPU has none for them.
        memory: of its memory, read or written.
        link: to another GPU of the machine, each way.
        network: to another machine, each way: `NETWORK`, shared by the GPUs of a machine.
    """

    float32: float
    tf32: float
    bfloat16: float
    memory: float
    link: float
    network: float = NETWORK


def _rates(float32: float, tf32: float, bfloat16: float, memory: float, link: float) -> Rates:
    """From TFLOP/s and GB/s."""
    return Rates(float32 * 1e12, tf32 * 1e12, bfloat16 * 1e12, memory * 1e9, link * 1e9)


# By name and memory in GB; a GPU without NVLink has the rate of its PCIe slot as `link`.
RATES: dict[tuple[str, int], Rates] = {
    ("A100", 40): _rates(19.5, 156, 312, 1555, 300),
    ("A100", 80): _rates(19.5, 156, 312, 2039, 300),
    ("H100", 80): _rates(67, 494.5, 989.5, 3350, 450),
    ("H100PCIE", 80): _rates(51, 378, 756, 2000, 300),
    ("H200", 141): _rates(67, 494.5, 989.5, 4800, 450),
    ("B200", 180): _rates(75, 1100, 2250, 7700, 900),
    ("L40S", 48): _rates(91.6, 183, 362, 864, 32),
    ("L4", 24): _rates(30.3, 60, 121, 300, 32),
    ("A10", 24): _rates(31.2, 62.5, 125, 600, 32),
    ("RTX4090", 24): _rates(82.6, 82.6, 165.2, 1008, 32),
    ("T4", 16): _rates(8.1, 8.1, 8.1, 320, 16),
}


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

    @property
    def rates(self) -> Rates | None:
        """The peak rates of one GPU; None without a GPU, or if it is not in `RATES`."""
        name = self.name.upper().replace("RTX ", "RTX")
        words = set(re.findall(r"[A-Z]+\d+[A-Z]*", name))
        if "PCIE" in re.split(r"[\s-]+", name):
            words = {f"{word}PCIE" for word in words}
        # A GPU of "80 GB" has up to 7 % more bytes than that.
        fitting = [key for key in RATES if key[0] in words and abs(self.memory / (key[1] * 1e9) - 1) < 0.1]
        return RATES[fitting[0]] if self.has_gpu and fitting else None

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
    return Hardware(f"CPU, {os.cpu_count()} cores", 0, _main_memory(), True)


def _main_memory() -> int:
    """The memory of the machine in bytes, or the limit of the container around this process."""
    installed = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = _CGROUP_LIMIT.read_text().strip() if _CGROUP_LIMIT.exists() else "max"
    return installed if limit == "max" else min(installed, int(limit))
