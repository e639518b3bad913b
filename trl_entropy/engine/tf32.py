"""TF32: products of matrices whose operands are rounded to 10 bits of mantissa, on a GPU that has units for them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


def is_available(device: torch.device) -> bool:
    """Whether the device multiplies in TF32 when asked to: NVIDIA's do from compute capability 8.0 on."""
    if device.type != "cuda" or not torch.cuda.is_available() or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


@contextmanager
def products() -> Iterator[None]:
    """
    Products of float32 matrices in TF32, summed in float32, until the context is left; all else stays float32.

    To be entered inside [`fp32_strict`], whose setting is put back exactly, also when the body raises. By the legacy
    switch, which sets the new one too: cuBLAS refuses to multiply where they differ.
    """
    matmul = torch.backends.cuda.matmul
    before, matmul.allow_tf32 = matmul.allow_tf32, True
    try:
        yield
    finally:
        matmul.allow_tf32 = before
