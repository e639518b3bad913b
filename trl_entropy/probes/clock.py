"""The time that a probe takes, on a device that goes on computing when the host already does something else."""

from __future__ import annotations

import time

import torch


def seconds(device: torch.device) -> float:
    """
    `time.perf_counter` once the device has done all that it was given, so that the difference of two calls is the time
    of what was asked for between them. On a CPU there is nothing to wait for.
    """
    torch.get_device_module(device).synchronize()
    return time.perf_counter()
