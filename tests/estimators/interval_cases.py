"""Simulated samples of known truth for every kind of 95 % interval, at any number n of prompts, steps or problems.

A case draws one sample and returns the interval that the package states for it. The table of docs/intervals.md is made
of them by `tests/benchmarks/interval_coverage.py`; tests ask some of them at a few sizes.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import pandas as pd
import torch
from torch import Generator, Tensor

from trl_entropy.analysis.attribution import shares
from trl_entropy.analysis.comparison import over_runs
from trl_entropy.estimators.attribution.shares import CategoryRecord
from trl_entropy.estimators.control.entropy_control import PredictionCheck, difference
from trl_entropy.estimators.control.exchange import mean_over_redraws
from trl_entropy.estimators.entropy_change.cross_prompt import cross_prompt_change
from trl_entropy.estimators.entropy_change.delta_entropy import RatioTerms, delta_measured, policy_entropy
from trl_entropy.estimators.kernel.fisher_kernel import kernel_means, length_correlation
from trl_entropy.estimators.kernel.score_change import change_agreement
from trl_entropy.estimators.noise.noise_scale import NoiseScaleRecord, jackknifed_parts, micro_batch_parts
from trl_entropy.estimators.statistics.calibration import wilson_interval
from trl_entropy.estimators.statistics.estimate import Estimate
from trl_entropy.estimators.statistics.moments import PairMoments, jackknife
from trl_entropy.estimators.statistics.over_prompts import ratio_intervals, share_intervals
from trl_entropy.estimators.statistics.pass_at_k import pass_at_k
from trl_entropy.estimators.statistics.pooled import PooledParts, sum_over_prompts

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


def cross_prompt(size: int, generator: Generator, signal: float, unbiased: bool = False) -> Interval:
    """(T17): the effect of a mean gradient of 64 numbers on an entropy with such a gradient; truth -`signal`^2.

    By the error that is logged, or by that of the unbiased variance.
    """
    x, y = (normal(generator, size, 64) / 8 + signal * torch.eye(64, dtype=torch.float64)[0] for _ in range(2))
    gram = x @ y.T
    change = cross_prompt_change(gram)
    return replace(
        change.cross_prompt, stderr=change.stderr_unbiased if unbiased else change.cross_prompt.stderr
    ).interval()


def kernel_mean(size: int, generator: Generator, name: str) -> Interval:
    """(T12): the mean of K_ij over pairs of 4 completions of each prompt; scores have mean 0 given the prompt."""
    prompts = torch.arange(size).repeat_interleave(4)
    scale = (0.5 * normal(generator, size)).exp().repeat_interleave(4)
    scores = scale[:, None] * normal(generator, 4 * size, 64)
    return kernel_means(scores @ scores.T, prompts)[name].interval()


def correlation_with_lengths(size: int, generator: Generator, planted: bool) -> Interval:
    """(T12): correlation of kernel and product of lengths over pairs of two prompts; 2 completions of each prompt.

    Planted, K_ij = T_i T_j + noise with as much variance as the product, so that the correlation is sqrt(1/2).
    """
    prompts, scale = torch.arange(size).repeat_interleave(2), 0.3
    log_lengths = scale * normal(generator, size).repeat_interleave(2) + scale * normal(generator, 2 * size)
    lengths = log_lengths.exp()
    noise = normal(generator, 2 * size, 2 * size).tril(-1)
    first, second = math.exp(scale**2), math.exp(4 * scale**2)  # of a length: mean, and mean of its square
    spread = math.sqrt(second**2 - first**4)
    kernel = spread * (noise + noise.T) + (lengths.outer(lengths) if planted else 0.0)
    return length_correlation(kernel, lengths, prompts).interval()


# ---- the slope of the entropy control: `PredictionCheck`


def control_slope(size: int, generator: Generator, other: float = 0.0, loud: bool = False) -> Interval:
    """Realised on predicted changes of n steps; a set-point corrects the error of the first of two entropies too.

    `other` is the spread of what the step changes beside the prediction, in that of an entropy's error; in a loud step
    both are ten times as large.
    """
    check, error = PredictionCheck(window=size), 0.5
    for spread in spreads(size, loud):
        wanted, before, after, rest = (spread * one for one in normal(generator, 4).tolist())
        predicted = wanted - 0.4 * error * before
        realised = predicted + error * (after - before + other * rest)
        stated = Estimate(realised, spread * error * math.sqrt(2), 15.0, 16)
        check.add(predicted, stated, shared=0.4 * (spread * error) ** 2)
    slope, margin = check.slope()[0], check.margin()
    return slope - margin, slope + margin


# ---- what the page draws: pandas


def category_on_the_page(
    size: int, generator: Generator, share: bool, num_steps: int = 1, loud: bool = False, skew: bool = False
) -> Interval:
    """One of three categories of the completions of n prompts a step: its change or its share of the sum, 0.5."""
    draw, rows = skewed if skew else normal, []
    for step, spread in enumerate(spreads(num_steps, loud)):
        means = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
        values = (means + spread * (draw(generator, size, 1) + draw(generator, size, 3)) / 16) / size
        rows += [
            (step, n, name, x) for n, row in enumerate(values.tolist()) for name, x in zip("abc", row, strict=True)
        ]
    table = pd.DataFrame(rows, columns=["step", "prompt_index", "category", "attribution"])
    found = shares(table, table["category"].astype("category")).loc["a"]
    return tuple(found[["low", "high"] if share else ["change_low", "change_high"]].astype(float))


def mean_over_runs(size: int, generator: Generator, skew: bool = False) -> Interval:
    """The mean of n runs at a step."""
    values = (skewed if skew else normal)(generator, size)
    steps = pd.DataFrame({"run": range(size), "step": 1, "settings": "", "reward": values})
    return tuple(over_runs(steps, "reward")[["low", "high"]].iloc[0])


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
    for unbiased, name in ((False, "effect across prompts"), (True, "the same by the unbiased error")):
        yield Case(name, "with signal", -0.25, make(cross_prompt, signal=0.5, unbiased=unbiased))
        yield Case(name, "without signal", 0.0, make(cross_prompt, signal=0.0, unbiased=unbiased))
    yield Case("mean of the Fisher kernel", "pairs of one prompt", 0.0, make(kernel_mean, name="same_prompt"))
    yield Case("mean of the Fisher kernel", "pairs of two prompts", 0.0, make(kernel_mean, name="cross_prompt"))
    yield Case(
        "correlation of kernel and lengths", "no correlation", 0.0, make(correlation_with_lengths, planted=False)
    )
    yield Case(
        "correlation of kernel and lengths",
        "half of the variance",
        0.5**0.5,
        make(correlation_with_lengths, planted=True),
    )
    yield Case("slope of the entropy control", "n steps, errors as stated", 1.0, control_slope)
    yield Case("slope of the entropy control", "n steps, other changes beside", 1.0, make(control_slope, other=2.0))
    yield Case("slope of the entropy control", "n steps, one ten times as large", 1.0, make(control_slope, loud=True))
    page = "by category, on the page"
    for share, name in ((False, f"change {page}"), (True, f"share {page}")):
        on_page = make(category_on_the_page, share=share)
        yield Case(name, "1 step", 0.5, on_page)
        yield Case(name, "8 steps, one of ten times the spread", 0.5, make(on_page, num_steps=8, loud=True))
        yield Case(name, "8 steps, skewed values", 0.5, make(on_page, num_steps=8, skew=True))
    yield Case("mean over runs", "n runs, normal values", 0.0, mean_over_runs)
    yield Case("mean over runs", "n runs, skewed values", 0.0, make(mean_over_runs, skew=True))
    reliability = 1 / (1 + 0.3**2)  # variance of the truth over that of the measured values
    for whole, way in ((True, "sandwich"), (False, "jackknife")):
        truths = {"slope": reliability, "corrected_slope": 1.0, "correlation": reliability}
        for name, truth in (truths | {"r_squared": reliability**2, "share_of_ceiling": 1.0}).items():
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
