"""The critical batch (T25): planted ones are found, and the interval covers, where a bootstrap does not."""

import itertools
import math

import pytest
import torch

from trl_entropy.estimators.noise.critical_batch import fit_at_best_rate, fit_critical_batch

PROMPTS = torch.tensor([4.0, 8.0, 16.0, 32.0, 64.0])


def form(batch, largest=0.02):
    return largest / (1 + batch / PROMPTS)


def by_scan(gains):
    """The least squares of all B_crit that are tried one after the other, in float64."""
    best = math.inf, math.nan
    mean = gains.double().mean(0)
    for place in range(3000):
        batch = math.exp(-4 + 12 * place / 3000)
        shape = 1 / (1 + batch / PROMPTS.double())
        rest = mean - shape * (shape @ mean) / (shape @ shape)
        best = min(best, (float(rest @ rest), batch))
    return best[1]


@pytest.mark.parametrize("batch", [0.5, 5.0, 85.0, 1000.0])
def test_a_planted_critical_batch_is_found(batch):
    found = fit_critical_batch(form(batch)[None] * torch.tensor([[0.8], [1.0], [1.2]]), PROMPTS)
    assert found.value == pytest.approx(batch, rel=0.01) and found.largest_gain == pytest.approx(0.02, rel=0.01)
    assert found.low == pytest.approx(batch, rel=0.01) and found.high == pytest.approx(batch, rel=0.01)
    assert found.gain(16) == pytest.approx(0.02 / (1 + batch / 16), rel=0.01)


def test_noisy_gains_are_fitted_as_by_trying_every_batch():
    gains = form(30) + 0.002 * torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    found = fit_critical_batch(gains, PROMPTS)
    assert found.value == pytest.approx(by_scan(gains), rel=0.01)
    assert found.low < found.value < found.high


def test_ends_of_the_scale_and_gains_that_say_nothing():
    noise = 1e-4 * torch.randn(3, 5, generator=torch.Generator().manual_seed(1))
    flat, proportional = fit_critical_batch(0.01 + noise, PROMPTS), fit_critical_batch(PROMPTS / 1e3 + noise, PROMPTS)
    assert flat.low == 0 and flat.value < 1 and flat.high < 2
    assert proportional.high == math.inf and proportional.low > 100
    assert all(math.isnan(number) for number in fit_critical_batch(-form(16)[None] + noise, PROMPTS))
    single = fit_critical_batch(form(16)[None], PROMPTS)
    assert single.value == pytest.approx(16, rel=0.01) and math.isnan(single.low) and math.isnan(single.high)
    falls = fit_critical_batch(1 / PROMPTS + noise, PROMPTS)
    assert falls.value == 0 and math.isnan(falls.low)  # the form does not hold at all


def redrawn(batch, num_seeds, number, spread=0.0015):
    """Gains whose noise falls with the number of prompts, and which the start of a seed moves all together."""
    generator = torch.Generator().manual_seed(num_seeds)
    own = torch.randn(number, num_seeds, 5, generator=generator) * (1 + 2 / PROMPTS.sqrt())
    shared = torch.randn(number, num_seeds, 1, generator=generator)
    return form(batch) + spread * (own + shared)


def bootstrapped(gains):
    """The percentile interval of the fits to all resamples of the seeds."""
    number = len(gains)
    rows = sorted(itertools.product(range(number), repeat=number))
    values = {}
    for row in rows:
        key = tuple(sorted(row))
        values[key] = values.get(key) or fit_critical_batch(gains[list(key)], PROMPTS).value
    spread = torch.tensor([values[tuple(sorted(row))] for row in rows]).nan_to_num(0).sort().values
    return float(spread[int(0.025 * len(rows))]), float(spread[int(0.975 * len(rows))])


@pytest.mark.slow
@pytest.mark.parametrize("num_seeds", [3, 5])
@pytest.mark.parametrize("batch", [10.0, 85.0])
def test_intervals_cover(batch, num_seeds):
    """300 redraws: 0.92 to 0.98."""
    found = [fit_critical_batch(gains, PROMPTS) for gains in redrawn(batch, num_seeds, 300)]
    inside = [one.low <= batch <= one.high for one in found]
    assert 0.92 <= sum(inside) / 300 <= 0.98


@pytest.mark.slow
def test_a_bootstrap_over_three_seeds_covers_less():
    inside = [low <= 10 <= high for low, high in map(bootstrapped, redrawn(10.0, 3, 100))]
    assert sum(inside) / 100 < 0.9


RATES = torch.tensor([0.5, 0.7, 1.0, 1.4, 2.0])


def cells():
    pairs = torch.cartesian_prod(PROMPTS, RATES)
    return pairs[:, 0], pairs[:, 1]


def of_steps(scale=1.0):
    """Exact gains of one step of gradient ascent on a quadratic with gradient noise, and tr(H Sigma) / G'HG of it."""
    generator = torch.Generator().manual_seed(2)
    gradient, curvature, noise = (torch.rand(50, generator=generator, dtype=torch.float64) for _ in range(3))
    noise = 40 * noise
    first, second, third = gradient @ gradient, gradient @ (curvature * gradient), curvature @ noise
    prompts, rates = cells()
    eta = rates * first / second
    return scale * (eta * first - eta.square() / 2 * (second + third / prompts)), float(third / second)


def test_at_the_best_learning_rate_it_is_the_noise_scale_of_mccandlish():
    gains, planted = of_steps()
    found = fit_at_best_rate(gains[None] * torch.tensor([[0.9], [1.0], [1.1]]), *cells())
    assert found.value == pytest.approx(planted, rel=1e-6)
    prompts, rates = cells()
    best = max(gains[(prompts == 64) & (rates == rate)].item() for rate in RATES)
    assert best <= found.gain(64) * 1.1 and found.gain(64) == pytest.approx(best, rel=0.1)


@pytest.mark.slow
def test_intervals_at_the_best_learning_rate_cover():
    """300 redraws at two levels of noise; with more of it the interval has no end."""
    gains, planted = of_steps()
    generator = torch.Generator().manual_seed(3)
    for noise in (0.05, 0.2):
        spread = noise * gains.abs().mean() * torch.randn(300, 4, len(gains), generator=generator, dtype=torch.float64)
        found = [fit_at_best_rate(gains + one, *cells()) for one in spread]
        assert 0.92 <= sum(one.low <= planted <= one.high for one in found) / 300 <= 0.99


def test_one_learning_rate_tells_no_curvature():
    prompts = torch.tensor([4.0, 8.0])
    assert math.isnan(fit_at_best_rate(torch.ones(3, 2), prompts, torch.ones(2)).value)
    line = fit_at_best_rate(RATES.expand(3, 5), torch.full((5,), 16.0), RATES)
    assert math.isnan(line.value)  # the numbers of prompts are all alike
