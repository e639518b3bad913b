"""Simulated samples of known truth for every kind of 95 % interval, at any number n of prompts, steps or problems.

A case draws one sample and returns the interval that the package states for it. The table of docs/intervals.md is made
of them by `tests/benchmarks/interval_coverage.py`; tests ask some of them at a few sizes.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from trl_entropy.estimators.attribution.shares import CategoryRecord
from trl_entropy.estimators.control.entropy_control import difference
from trl_entropy.estimators.control.exchange import mean_over_redraws
from trl_entropy.estimators.entropy_change.delta_entropy import RatioTerms, delta_measured, policy_entropy
from trl_entropy.estimators.kernel.fisher_kernel import kernel_means
from trl_entropy.estimators.kernel.score_change import change_agreement
from trl_entropy.estimators.noise.noise_scale import NoiseScaleRecord, jackknifed_parts, micro_batch_parts
from trl_entropy.estimators.statistics.calibration import wilson_interval
from trl_entropy.estimators.statistics.moments import PairMoments, jackknife
from trl_entropy.estimators.statistics.over_prompts import ratio_intervals, share_intervals
from trl_entropy.estimators.statistics.pass_at_k import pass_at_k
from trl_entropy.estimators.statistics.pooled import PooledParts, sum_over_prompts
from trl_entropy.estimators.statistics.u_statistic import (
    row_means,
    u_statistic_estimate,
    u_statistic_jackknife_estimate,
)

Interval = tuple[float, float]
Draw = Callable[[int, Generator], Interval]
NUM_STEPS, LOUD = 20, 10.0  # steps of a pool; the spread of a loud step, in those of the others
SKEW = 1.0  # standard deviation of the logarithm of skewed values: their skewness is 6.2


@dataclass(frozen=True)
class Case:
    """An interval of the package, the sample that it is drawn from, and the truth that it should cover."""

    name: str
    sample: str
    truth: float
    draw: Draw


def normal(generator: Generator, *shape: int) -> Tensor:
    """Standard normal numbers."""
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def skewed(generator: Generator, *shape: int) -> Tensor:
    """Log-normal numbers of mean 0."""
    return (SKEW * normal(generator, *shape)).exp() - math.exp(SKEW**2 / 2)


def hits(case: Case, size: int, repeats: int, seed: int = 0) -> tuple[int, int, int]:
    """How many of the intervals cover the truth, how many are not bounded on both sides, and how many are missing."""
    generator, covered, unbounded, missing = torch.Generator().manual_seed(seed), 0, 0, 0
    for _ in range(repeats):
        low, high = case.draw(size, generator)
        missing += math.isnan(low + high) and not (math.isinf(low) or math.isinf(high))
        covered += low <= case.truth <= high
        unbounded += math.isinf(low) or math.isinf(high)
    return covered, unbounded, missing


# ---- means and ratios over prompts: `Linearization.estimate`, Student's t with P - 1


def entropy_of(size: int, generator: Generator, spread: float, skew: bool = False) -> Interval:
    """Entropy per token of 4 completions of each prompt, with a prompt's part in lengths and entropies."""
    draw = skewed if skew else normal
    prompts, shared = torch.arange(size).repeat_interleave(4), draw(generator, size).repeat_interleave(4)
    log_length = (spread * normal(generator, size)).repeat_interleave(4) + spread / 2 * normal(generator, 4 * size)
    lengths = (4 + log_length).exp().ceil()
    numerators = lengths * (0.5 + 0.1 * shared + 0.05 * normal(generator, 4 * size))
    return policy_entropy(RatioTerms(numerators, lengths)).estimate(prompts).interval()


def change_of(size: int, generator: Generator, skew: bool = False) -> Interval:
    """The change of that entropy by a step, on the same completions: paired."""
    draw = skewed if skew else normal
    prompts = torch.arange(size).repeat_interleave(4)
    lengths = (4 + (0.5 * normal(generator, size)).repeat_interleave(4)).exp()
    rate = 0.5 + 0.1 * normal(generator, size).repeat_interleave(4)
    change = 0.01 + 0.01 * draw(generator, size).repeat_interleave(4) + 0.01 * normal(generator, 4 * size)
    before, after = RatioTerms(lengths * rate, lengths), RatioTerms(lengths * (rate + change), lengths)
    return delta_measured(before, after).estimate(prompts).interval()


def difference_of(size: int, generator: Generator, ratio: float) -> Interval:
    """The difference of two independent means, one with `ratio` times the other's spread."""
    ones, prompts = torch.ones(size, dtype=torch.float64), torch.arange(size)
    later, earlier = (
        policy_entropy(RatioTerms(spread * normal(generator, size), ones)).estimate(prompts) for spread in (1.0, ratio)
    )
    return difference(later, earlier).interval()


# ---- sums over steps: `PooledParts`


def spreads(num_steps: int, loud: bool) -> list[float]:
    """The spread of each step: 1, or one of the steps has `LOUD` times that of the others."""
    return [LOUD if loud and step == 0 else 1.0 for step in range(num_steps)]


def pooled_mean(
    size: int, generator: Generator, loud: bool = False, skew: bool = False, num_steps: int = NUM_STEPS
) -> Interval:
    """The mean over steps of sums over prompts of mean 1."""
    draw, pooled = skewed if skew else normal, PooledParts.empty(1)
    for spread in spreads(num_steps, loud):
        pooled = pooled.update(sum_over_prompts((1 + spread * draw(generator, size, 1)) / size))
    return pooled.mean(torch.ones(1, dtype=torch.float64)).interval()


def share_of(
    size: int, generator: Generator, loud: bool = False, num_runs: int = 1, num_steps: int = NUM_STEPS
) -> Interval:
    """The share of one of three categories, 0.5, over steps; Fieller's interval."""
    names, record = ("a", "b", "c"), CategoryRecord.empty(("a", "b", "c"))
    means, ones = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64), torch.ones(3, dtype=torch.int64)
    for _ in range(num_runs):
        run = CategoryRecord.empty(names)
        for spread in spreads(num_steps, loud):
            sums = means + spread * (0.5 * normal(generator, size, 1) * means + 0.3 * normal(generator, size, 3))
            run = run.update(sums, ones)
        record = record.merge(run)
    return record.share_interval("a")


def slope_of_changes(size: int, generator: Generator) -> Interval:
    """Measured on predicted changes of 4 completions of each prompt, through the origin; one step, slope 1."""
    prompts = torch.arange(size).repeat_interleave(4)
    predicted = normal(generator, size).repeat_interleave(4) + normal(generator, 4 * size)
    noise = 0.3 * (normal(generator, size).repeat_interleave(4) + normal(generator, 4 * size))
    return change_agreement(predicted, predicted + noise, prompts)[0].interval()


def exchange_of(size: int, generator: Generator) -> Interval:
    """A ratio of mean changes, 2, of n redraws and n blocks of a large set; Fieller's interval."""
    redraws = torch.tensor([1.0, 2.0], dtype=torch.float64) + normal(generator, size, 2)
    blocks = normal(generator, size, 2)
    parts = mean_over_redraws(redraws + blocks.mean(0), blocks)
    unit = torch.eye(2, dtype=torch.float64)
    return PooledParts.empty(2).update(parts).ratio_interval(unit[1], unit[0])


# ---- the noise scale


def noise_scale_of(
    size: int, generator: Generator, planted: float, num_steps: int = 8, loud: bool = False, skew: bool = False
) -> Interval:
    """(T14): groups' gradients of 64 numbers with |G|^2 = 1; a loud step has a longer gradient, of the same scale."""
    draw, record = skewed if skew else normal, NoiseScaleRecord.empty()
    variance = math.exp(2 * SKEW**2) - math.exp(SKEW**2) if skew else 1.0
    signal, noise = (0.0, 1.0) if math.isinf(planted) else (1.0, planted)
    for length in spreads(num_steps, loud):
        rows = draw(generator, size, 64) * math.sqrt(noise / 64 / variance)
        rows[:, 0] += signal
        rows = rows * length
        record = record.update(jackknifed_parts(rows.square().sum(1), rows @ rows.mean(0)))
    return record.interval()


def noise_scale_of_micro_batches(size: int, generator: Generator, planted: float, loud: bool = False) -> Interval:
    """(T15): n steps of 8 micro-batches of 4 prompts each, of which only norms are known."""
    record, parts = NoiseScaleRecord.empty(), None
    for length in spreads(size, loud):
        rows = normal(generator, 8, 64) * math.sqrt(planted / 64 / 4)
        rows[:, 0] += 1.0
        rows = rows * length
        parts, pooled = micro_batch_parts(rows.square().sum(1), float(rows.mean(0).square().sum()), 32, parts)
        record = record.merge(NoiseScaleRecord(pooled))
    return record.interval()


# ---- products of pairs of prompts


def cross_prompt(size: int, generator: Generator, signal: float, with_pairs: bool) -> Interval:
    """(T17): the product of two mean gradients of 64 numbers; truth `signal`^2."""
    x, y = (normal(generator, size, 64) / 8 + signal * torch.eye(64, dtype=torch.float64)[0] for _ in range(2))
    gram = x @ y.T
    if with_pairs:
        return u_statistic_estimate(gram).interval()
    return u_statistic_jackknife_estimate(row_means(gram)).interval()


def kernel_mean(size: int, generator: Generator, name: str) -> Interval:
    """(T12): the mean of K_ij over pairs of 4 completions of each prompt; scores have mean 0 given the prompt."""
    prompts = torch.arange(size).repeat_interleave(4)
    scale = (0.5 * normal(generator, size)).exp().repeat_interleave(4)
    scores = scale[:, None] * normal(generator, 4 * size, 64)
    return kernel_means(scores @ scores.T, prompts)[name].interval()


# ---- regressions over steps: `PairMoments`

STATISTICS = {
    "slope": PairMoments.slope,
    "corrected_slope": PairMoments.corrected_slope,
    "correlation": PairMoments.correlation,
    "r_squared": PairMoments.r_squared,
    "share_of_ceiling": PairMoments.share_of_ceiling,
}


def regression(size: int, generator: Generator, name: str, whole: bool, loud: bool = False, noise: float = 0.3):
    """A statistic of predicted on measured changes of n steps, each with stated noise; the truth is slope 1."""
    truth = normal(generator, size) * (torch.tensor(spreads(size, loud)) if loud else 1.0)
    x, y = truth + noise * normal(generator, size), truth + noise * normal(generator, size)
    pairs = [PairMoments.empty().update(a, b, noise, noise) for a, b in zip(x.tolist(), y.tolist(), strict=True)]
    statistic = STATISTICS[name]
    if whole:
        return statistic(functools.reduce(PairMoments.merge, pairs)).interval()
    return jackknife(pairs, statistic).interval()


# ---- evaluation


def evaluated(size: int, generator: Generator, k: int, easy: bool) -> Interval:
    """pass@k of 8 samples of n problems, whose chances are uniform, or 0 for most (`easy` false)."""
    chance = torch.rand(size, generator=generator, dtype=torch.float64)
    if not easy:
        chance = chance * (torch.rand(size, generator=generator) < 0.1)
    correct = (torch.rand(size, 8, generator=generator) < chance[:, None]).sum(1)
    ends = share_intervals(pass_at_k(correct, 8, k)[:, None], torch.ones(size, 1))
    return tuple(ends[0].tolist())


def greedy(size: int, generator: Generator, chance: float) -> Interval:
    """The share of n problems whose one answer is correct."""
    correct = (torch.rand(size, 1, generator=generator) < chance).double()
    return tuple(share_intervals(correct, torch.ones(size, 1))[0].tolist())


def mean_length(size: int, generator: Generator) -> Interval:
    """The mean length of 8 samples of n problems; lengths are log-normal with a problem's part in common."""
    lengths = (4 + 0.5 * normal(generator, size, 1) + 0.5 * normal(generator, size, 8)).exp()
    ends = ratio_intervals(lengths.sum(1, keepdim=True), torch.full((size, 1), 8.0))
    return tuple(ends[0].tolist())


def mean_token_entropy(size: int, generator: Generator) -> Interval:
    """Entropy per token of 8 samples of n problems: a ratio of sums, of unequal lengths."""
    lengths = (4 + 0.5 * normal(generator, size, 1) + 0.5 * normal(generator, size, 8)).exp()
    rates = 0.5 + 0.1 * normal(generator, size, 1) + 0.05 * normal(generator, size, 8)
    sums = (lengths * rates).sum(1, keepdim=True)
    return tuple(ratio_intervals(sums, lengths.sum(1, keepdim=True))[0].tolist())


def share_covered(size: int, generator: Generator) -> Interval:
    """Wilson's interval of a share of n trials, 0.9."""
    return wilson_interval(int((torch.rand(size, generator=generator) < 0.9).sum()), size)


def cases() -> Iterable[Case]:
    """All of them, in the order of the table."""
    make = functools.partial
    tilt = 0.5 + 0.1 * 0.0
    yield Case("mean or ratio over prompts", "normal values, lengths alike", tilt, make(entropy_of, spread=0.1))
    yield Case("mean or ratio over prompts", "normal values, lengths uneven", tilt, make(entropy_of, spread=0.8))
    yield Case(
        "mean or ratio over prompts", "skewed values, uneven lengths", tilt, make(entropy_of, spread=0.5, skew=True)
    )
    yield Case("paired change on a probe batch", "normal values", 0.01, change_of)
    yield Case("paired change on a probe batch", "skewed values", 0.01, make(change_of, skew=True))
    yield Case("difference of two estimates", "equal spreads", 0.0, make(difference_of, ratio=1.0))
    yield Case("difference of two estimates", "spreads 1 and 10", 0.0, make(difference_of, ratio=10.0))
    yield Case("mean over steps", "1 step", 1.0, make(pooled_mean, num_steps=1))
    yield Case("mean over steps", "20 steps of equal spread", 1.0, pooled_mean)
    yield Case("mean over steps", "20 steps, one of ten times the spread", 1.0, make(pooled_mean, loud=True))
    yield Case("mean over steps", "20 steps, skewed values", 1.0, make(pooled_mean, skew=True))
    yield Case("share of the change", "20 steps of equal spread", 0.5, share_of)
    yield Case("share of the change", "20 steps, one of ten times the spread", 0.5, make(share_of, loud=True))
    yield Case("share of the change", "three runs of such steps", 0.5, make(share_of, loud=True, num_runs=3))
    yield Case("slope of a step's changes", "1 step", 1.0, slope_of_changes)
    yield Case("exchange of reward for entropy", "n redraws, n blocks", 2.0, exchange_of)
    yield Case("noise scale", "1 step, scale 10", 10.0, make(noise_scale_of, planted=10.0, num_steps=1))
    yield Case("noise scale", "8 steps, scale 10", 10.0, make(noise_scale_of, planted=10.0))
    yield Case("noise scale", "8 steps, scale 10, skewed values", 10.0, make(noise_scale_of, planted=10.0, skew=True))
    yield Case("noise scale", "8 steps, one ten times as long", 10.0, make(noise_scale_of, planted=10.0, loud=True))
    yield Case("noise scale", "8 steps without signal", math.inf, make(noise_scale_of, planted=math.inf))
    yield Case("noise scale, micro-batches", "n steps", 10.0, make(noise_scale_of_micro_batches, planted=10.0))
    yield Case(
        "noise scale, micro-batches",
        "n steps, one ten times as long",
        10.0,
        make(noise_scale_of_micro_batches, planted=10.0, loud=True),
    )
    for with_pairs, name in ((True, "effect across prompts, unbiased error"), (False, "the same, jackknife")):
        yield Case(name, "with signal", 0.25, make(cross_prompt, signal=0.5, with_pairs=with_pairs))
        yield Case(name, "without signal", 0.0, make(cross_prompt, signal=0.0, with_pairs=with_pairs))
    yield Case("mean of the Fisher kernel", "pairs of one prompt", 0.0, make(kernel_mean, name="same_prompt"))
    yield Case("mean of the Fisher kernel", "pairs of two prompts", 0.0, make(kernel_mean, name="cross_prompt"))
    reliability = 1 / (1 + 0.3**2)  # variance of the truth over that of the measured values
    for whole, way in ((True, "sandwich"), (False, "jackknife")):
        for name, truth in (("slope", reliability), ("corrected_slope", 1.0), ("r_squared", reliability**2)):
            text = name.replace("_", " ").replace("r squared", "R^2")
            yield Case(f"{text} over steps, {way}", "n steps", truth, make(regression, name=name, whole=whole))
    yield Case(
        "corrected slope over steps, jackknife",
        "n steps, one of ten times the change",
        1.0,
        make(regression, name="corrected_slope", whole=False, loud=True),
    )
    yield Case("pass@1 of 8 samples", "chances uniform", 0.5, make(evaluated, k=1, easy=True))
    yield Case("pass@1 of 8 samples", "nine of ten problems unsolvable", 0.05, make(evaluated, k=1, easy=False))
    yield Case("pass@4 of 8 samples", "chances uniform", 0.8, make(evaluated, k=4, easy=True))
    yield Case("greedy accuracy", "chance 0.5", 0.5, make(greedy, chance=0.5))
    yield Case("greedy accuracy", "chance 0.95", 0.95, make(greedy, chance=0.95))
    yield Case("mean length of samples", "skewed lengths", math.exp(4.25), mean_length)
    yield Case("entropy of samples per token", "uneven lengths", 0.5, mean_token_entropy)
    yield Case("share of intervals that cover (Wilson)", "n redraws, share 0.9", 0.9, share_covered)
