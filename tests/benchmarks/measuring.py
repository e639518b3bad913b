"""Measuring for the benchmarks: seconds and memory of a function call, and intervals over rounds."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable

from torch.profiler import ProfilerActivity, profile

from trl_entropy.estimators.statistics.estimate import Estimate


def interval(values: Iterable[float]) -> tuple[float, float, float]:
    """Mean of independent values, and the ends of its 95 % interval (Student's t)."""
    values = list(values)
    mean, stderr = statistics.mean(values), statistics.stdev(values) / len(values) ** 0.5
    return mean, *Estimate(mean, stderr, len(values) - 1, len(values)).interval()


def seconds(function: Callable[[], object]) -> tuple[float, float]:
    """CPU seconds and wall-clock seconds of a call."""
    cpu, wall = time.process_time(), time.perf_counter()
    function()
    return time.process_time() - cpu, time.perf_counter() - wall


def peak_memory(function: Callable[[], object]) -> float:
    """Peak memory that torch allocates during a call, in MiB above what was allocated before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        function()
    allocated = peak = 0
    for event in record.profiler.kineto_results.events():
        if event.name() == "[memory]":
            allocated += event.nbytes()
            peak = max(peak, allocated)
    return peak / 2**20
