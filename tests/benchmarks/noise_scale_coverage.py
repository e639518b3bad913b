"""
Coverage of the 95 % intervals of the noise scale for known noise scales: the table of docs/theory.md, (T14), (T15).

    python -m tests.benchmarks.noise_scale_coverage [--repeats 300] [--prompts 16] [--steps 8]

The group gradients are simulated: a fixed direction plus isotropic Gaussian noise in 64 dimensions.
"""

from __future__ import annotations

import argparse
import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from tests.estimators.variance_oracles import unbiased_parts
from trl_entropy.estimators.noise.noise_scale import NoiseScaleRecord, jackknifed_parts, micro_batch_parts
from trl_entropy.estimators.statistics.pooled import StepParts

DIMENSIONS = 64
PLANTED = (0.1, 1.0, 10.0, 100.0, 1000.0, math.inf)
MICRO_BATCH = 4


def from_groups(parts_of: Callable[[Tensor], StepParts], steps: list[Tensor]) -> NoiseScaleRecord:
    """(T14): each step gives an estimate and its standard error."""
    return functools.reduce(lambda record, rows: record.update(parts_of(rows)), steps, NoiseScaleRecord.empty())


def from_micro_batches(steps: list[Tensor]) -> NoiseScaleRecord:
    """(T15): only norms of micro-batches of whole groups are known; errors come from the scatter over steps."""
    record, parts = NoiseScaleRecord.empty(), None
    for rows in steps:
        sq_norms = rows.unflatten(0, (-1, MICRO_BATCH)).mean(1).square().sum(1)
        parts, pooled = micro_batch_parts(sq_norms, float(rows.mean(0).square().sum()), len(rows), parts)
        record = record.merge(NoiseScaleRecord(pooled))
    return record


def jackknife(rows: Tensor) -> StepParts:
    return jackknifed_parts(rows.square().sum(1), rows @ rows.mean(0))


def with_pairs(rows: Tensor) -> StepParts:
    return unbiased_parts(rows @ rows.T)


WAYS: dict[str, Callable[[list[Tensor]], NoiseScaleRecord]] = {
    "jackknife": functools.partial(from_groups, jackknife),
    "with pairs": functools.partial(from_groups, with_pairs),
    f"micro-batches of {MICRO_BATCH}": from_micro_batches,
}


def group_gradients(noise_scale: float, num_prompts: int, generator: torch.Generator) -> Tensor:
    """Rows Y_n with |G|^2 = 1 and tr(Sigma) = `noise_scale`; for an infinite one G = 0 and tr(Sigma) = 1."""
    noise = torch.randn(num_prompts, DIMENSIONS, generator=generator, dtype=torch.float64) / math.sqrt(DIMENSIONS)
    if math.isinf(noise_scale):
        return noise
    rows = math.sqrt(noise_scale) * noise
    rows[:, 0] += 1
    return rows


def coverage(noise_scale: float, way: str, options: argparse.Namespace) -> tuple[float, float]:
    """Share of intervals that contain the true noise scale, and share of those without an upper end."""
    generator, covered, unbounded = torch.Generator().manual_seed(options.seed), 0, 0
    for _ in range(options.repeats):
        steps = [group_gradients(noise_scale, options.prompts, generator) for _ in range(options.steps)]
        low, high = WAYS[way](steps).interval()
        covered += low <= noise_scale <= high
        unbounded += math.isinf(high)
    return covered / options.repeats, unbounded / options.repeats


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("repeats", 300), ("prompts", 16), ("steps", 8), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    for way in WAYS:
        for planted in PLANTED:
            covered, unbounded = coverage(planted, way, options)
            print(f"{way:<18} noise scale {planted:>6}: covered {covered:.3f}, unbounded above {unbounded:.3f}")


if __name__ == "__main__":
    main()
