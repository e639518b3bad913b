"""What the benchmarks measure with: seconds and memory of a function, and intervals over rounds."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable

from torch.profiler import ProfilerActivity, profile

from trl_entropy.estimators.statistics.estimate import Estimate


def interval(values: Iterable[float]) -> tuple[float, float, float]:
    """Mean of independent values, and its 95 % interval by Student's t."""
    values = list(values)
    mean, stderr = statistics.mean(values), statistics.stdev(values) / len(values) ** 0.5
    return mean, *Estimate(mean, stderr, len(values) - 1, len(values)).interval()


def seconds(function: Callable[[], object]) -> tuple[float, float]:
    """CPU and wall seconds of a call."""
    cpu, wall = time.process_time(), time.perf_counter()
    function()
    return time.process_time() - cpu, time.perf_counter() - wall


def peak_memory(function: Callable[[], object]) -> float:
    """MiB that torch had allocated at the peak of a call, above what it had before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        function()
    allocated = peak = 0
    for event in record.profiler.kineto_results.events():
        if event.name() == "[memory]":
            allocated += event.nbytes()
            peak = max(peak, allocated)
    return peak / 2**20
