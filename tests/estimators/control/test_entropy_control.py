"""(T19): the correction meets its budget, is the smallest that does, and knows when it cannot."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_policy import loglog_slope
from tiny_step import TinyStep

from trl_entropy.estimators.control.entropy_control import (
    ControlProducts,
    PredictionCheck,
    RunningHalves,
    SetPoint,
    control_products,
    correction,
    crossed_change,
    difference,
    floored_metric,
    mean_of,
)
from trl_entropy.estimators.statistics.estimate import Estimate

NO_CAP = 1e9


def vectors(seed, num=5):
    generator = torch.Generator().manual_seed(seed)
    made = torch.randn(num, 12, generator=generator, dtype=torch.float64)
    made[3] = made[3].exp()  # the metric
    return [{"a": row[:5], "b": row[5:].view(7, 1)} for row in made]


def whole(vector):
    return torch.cat([part.flatten() for part in vector.values()])


@given(st.integers(0, 1000), st.floats(-1, 1))
def test_the_budget_is_met_by_the_smallest_correction(seed, budget):
    g, step, loss, metric, other = vectors(seed)
    products = control_products((g, g), step, metric, loss)
    found = correction(products, budget, floor=False, cap=NO_CAP)
    c = {name: found.multiplier * metric[name] * g[name] for name in g}
    change = float(whole(g) @ (whole(step) + whole(c)))
    assert change == pytest.approx(budget, abs=1e-10) == found.predicted and not found.infeasible
    length = float((whole(c) ** 2 / whole(metric)).sum())
    assert found.relative_size == pytest.approx(math.sqrt(length / products.step_square))
    sideways = whole(other) - whole(g) * (whole(other) @ whole(g)) / (whole(g) @ whole(g))  # moves no entropy
    longer = float(((whole(c) + sideways) ** 2 / whole(metric)).sum())
    assert longer > length


@given(st.integers(0, 1000))
def test_products_equal_loops(seed):
    a, b, step, metric, loss = vectors(seed)
    metric["a"][2] = 0.0  # dead: no share in the metric's products, nor in the step's length
    found = control_products((a, b), step, metric, loss)
    names = ["change", "square", "cross", "step_square", "loss"]
    expected = dict.fromkeys(names, 0.0)
    for x, y, d, m, gl in zip(*(whole(v).tolist() for v in (a, b, step, metric, loss)), strict=True):
        g = (x + y) / 2
        values = (g * d, g * g * m, x * y * m, d * d / m if m else 0.0, gl * g * m)
        expected = {name: expected[name] + value for name, value in zip(names, values, strict=True)}
    assert found._asdict() == pytest.approx(expected, rel=1e-12)


def test_the_cross_product_is_unbiased_and_the_plain_one_is_not():
    """Every pair of draws of two independent halves: <g_a, g_b> averages to <g, g>; the mean's square overshoots."""
    draws = torch.tensor([[1.0, 0.5], [2.0, -1.0], [-0.5, 1.5]], dtype=torch.float64)
    metric = {"p": torch.tensor([0.7, 2.0], dtype=torch.float64)}
    zero = {"p": torch.zeros(2, dtype=torch.float64)}
    pairs = [
        control_products(({"p": draws[i]}, {"p": draws[j]}), zero, metric, zero)
        for i, j in itertools.product(range(3), repeat=2)
    ]
    true = float(draws.mean(0).square() @ metric["p"])
    assert sum(pair.cross for pair in pairs) / 9 == pytest.approx(true, rel=1e-12)
    assert sum(pair.square for pair in pairs) / 9 > 1.5 * true


def test_the_crossed_change_is_unbiased_and_the_plain_one_is_not():
    """Every pair of outcomes of two independent halves; an outcome gives a half's entropy and loss gradient."""
    outcomes = [([1.0, 0.5], [0.2, -1.0]), ([2.0, -1.0], [0.9, 0.3]), ([-0.5, 1.5], [-0.4, 0.8])]
    outcomes = [tuple(torch.tensor(x, dtype=torch.float64) for x in outcome) for outcome in outcomes]
    metric, rest = (torch.tensor(x, dtype=torch.float64) for x in ([0.7, 2.0], [0.1, -0.3]))
    crossed, plain = [], []
    for (g_a, loss_a), (g_b, loss_b) in itertools.product(outcomes, repeat=2):
        loss = loss_a + loss_b
        step = rest - metric * loss
        vectors = [{"p": x} for x in (loss_a, loss, step, metric)]
        crossed.append(crossed_change(({"p": g_a}, {"p": g_b}), *vectors))
        plain.append(float((g_a + g_b) / 2 @ step))
    g, loss = (torch.stack([outcome[i] for outcome in outcomes]).mean(0) for i in (0, 1))
    true = float(g @ (rest - metric * 2 * loss))
    assert sum(crossed) / 9 == pytest.approx(true, rel=1e-12)
    assert abs(sum(plain) / 9 - true) > 0.1


@pytest.mark.parametrize("seed", range(3))
def test_the_entropy_changes_by_the_budget_to_first_order(seed):
    """A clipped AdamW step of torch with momentum and decay; the entropy by enumeration, its gradient exact."""
    step = TinyStep(seed)
    g = step.policy.policy_entropy_gradient(step.theta)
    start, scales, errors = step.policy.policy_entropy(step.theta), (0.25, 0.125, 0.0625, 0.03125), []
    for scale in scales:
        d = scale * step.update
        products = control_products(({"p": g}, {"p": g}), {"p": d}, {"p": step.metric}, {"p": step.gradient})
        found = correction(products, 0.01 * scale, floor=False, cap=NO_CAP)
        after = step.policy.policy_entropy(step.theta + d + found.multiplier * step.metric * g)
        errors.append(float(after - start) - 0.01 * scale)
    assert loglog_slope(scales, errors) == pytest.approx(2, abs=0.3)
    assert abs(errors[-1]) < 0.1 * 0.01 * scales[-1]


PRODUCTS = ControlProducts(-0.5, square=4.0, cross=3.0, step_square=1.0, loss=0.6)


def test_floor_only_ever_raises_the_entropy():
    assert correction(PRODUCTS, -0.2, True, NO_CAP).multiplier == pytest.approx(0.1)
    assert correction(PRODUCTS, -0.8, True, NO_CAP) == (0.0, -0.5, False, 0.0)
    assert correction(PRODUCTS, -0.8, False, NO_CAP).multiplier == pytest.approx(-0.1)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("step_length", [1.0, 3.0])
def test_the_cap_binds_on_either_side_and_says_so(sign, step_length):
    """lambda |M g| in M^-1 is lambda sqrt(square) = 2 lambda, and at most half the step's length."""
    products = PRODUCTS._replace(step_square=step_length**2)
    found, most = correction(products, 10.0 * sign, False, cap=0.5), sign * 0.25 * step_length
    assert found.infeasible and found.relative_size == pytest.approx(0.5)
    assert found.multiplier == pytest.approx(most) and found.predicted == pytest.approx(-0.5 + most * 3)


def test_the_denominator_has_a_floor_and_nothing_divides_by_zero():
    assert PRODUCTS.denominator == 3 and PRODUCTS._replace(cross=-1.0).denominator == 1
    assert PRODUCTS.noise_share == 0.25 and PRODUCTS.price == pytest.approx(0.2)
    nothing = ControlProducts(*[0.0] * 5)
    assert correction(nothing, 0.0, False, 1.0) == (0.0, 0.0, False, 0.0)
    assert correction(nothing, 0.1, False, 1.0).infeasible
    assert math.isnan(nothing.price) and math.isnan(nothing.noise_share)


def test_metric_floor_is_of_the_mean_over_live_coordinates():
    metric = {"a": torch.tensor([1e6, 1.0]), "b": torch.tensor([[0.0, 0.25]])}
    mean = (1e-6 + 1 + 4) / 3
    found = floored_metric(metric, 0.1)
    assert found["a"].tolist() == pytest.approx([1 / (0.1 * mean), 1.0]) and found["b"].tolist() == [[0.0, 0.25]]
    assert floored_metric(metric, 0.0) is metric
    assert not floored_metric({"a": torch.zeros(3)}, 0.1)["a"].any()


def test_set_point_reaches_its_target_whatever_the_constant_error():
    """Each step changes 0.003 less than predicted: without the running mean the entropy would stay 0.015 below."""
    control, entropy, path = SetPoint(0.2, gain=0.2, integral_gain=0.1, max_change=0.02), 0.4, []
    for _ in range(120):
        budget = control.target_change(entropy)
        control.learn(budget, budget - 0.003)
        entropy, path = entropy + budget - 0.003, [*path, entropy]
    assert abs(budget) <= 0.02 and entropy == pytest.approx(0.2, abs=1e-4)
    assert min(path) > 0.195, "what it learned on the way must not carry it far beyond"
    still = SetPoint(0.2, gain=0.2, integral_gain=0.0, max_change=0.02)
    entropy = 0.4
    for _ in range(120):
        entropy += still.target_change(entropy) - 0.003
    assert entropy == pytest.approx(0.185, abs=1e-4)


def test_what_saturation_keeps_back_does_not_wind_up():
    control = SetPoint(0.2, gain=0.2, integral_gain=0.1, max_change=0.01)
    for _ in range(50):  # far away: asked 0.01, predicted and made 0.01
        assert control.target_change(2.0) == -0.01
        control.learn(-0.01, -0.01)
    assert control.bias == 0


@pytest.mark.parametrize("slope, fails", [(1.0, False), (0.7, False), (0.2, True), (-1.0, True), (3.0, True)])
def test_predictions_that_fail_are_found(slope, fails):
    check = PredictionCheck()
    for step in range(20):
        assert not check.failed, "only a full window says anything"
        predicted = 0.01 * (1 + step % 3)
        check.add(predicted, Estimate(slope * predicted, 0.003, 30.0, 64))
    assert check.failed == fails and check.slope()[0] == pytest.approx(slope)


def test_noise_alone_refutes_nothing():
    check = PredictionCheck()
    for step in range(25):
        check.add(0.0005, Estimate(0.01 * (-1) ** step, 0.01, 30.0, 64))
    assert not check.failed and len(check.pairs) == 20
    assert math.isnan(PredictionCheck().slope()[0])


def test_the_error_that_a_set_point_feeds_back_is_taken_out():
    """Held at its target with noisy estimates, a perfect prediction has slope 1; uncorrected it seems several."""
    generator = torch.Generator().manual_seed(0)
    noise, entropy, plain = 0.01, 0.2, PredictionCheck(window=4000)
    control, check, last = SetPoint(0.2, 0.2, 0.1, max_change=1.0), PredictionCheck(window=4000), None
    for _ in range(4000):
        seen = Estimate(entropy + noise * float(torch.randn((), generator=generator)), noise, 60.0, 64)
        if last is not None:
            predicted, shared, before = last
            realised = difference(seen, before)
            check.add(predicted, realised, shared)
            plain.add(predicted, realised)
            control.learn(predicted, realised.value)
        budget = control.target_change(seen.value)
        last = budget, control.sensitivity(seen.value) * noise**2, seen
        entropy += budget
    assert check.slope()[0] == pytest.approx(1, abs=0.25) and plain.slope()[0] > 2
    assert SetPoint(0.2, 0.2, 0.1, max_change=0.01).sensitivity(0.4) == 0


def test_noise_of_the_steps_themselves_refutes_nothing():
    """Entropy that also moves by itself, three times more than is asked: the errors of h alone say failed."""
    generator, noise = torch.Generator().manual_seed(0), 0.003
    failed = {"scatter": 0, "known": 0}
    for _ in range(50):
        check = PredictionCheck()
        for _ in range(40):
            predicted, own, seen = (torch.randn(3, generator=generator) * torch.tensor([0.004, 0.015, noise])).tolist()
            check.add(predicted, Estimate(predicted + own + seen, noise, 60.0, 64))
            slope, _ = check.slope()
            known = 3.29 * noise / math.sqrt(sum(p * p for p, _, _, _ in check.pairs))
            failed["scatter"] += check.failed
            failed["known"] += len(check.pairs) == 20 and (slope + known < 0.5 or slope - known > 2)
    assert failed["known"] > 100 and failed["scatter"] < 20, failed


def test_running_halves_are_weighted_means_of_each_half():
    steps = [vectors(seed, num=4)[:2] for seed in range(4)]
    running = RunningHalves(0.7)
    for halves in steps:
        found = running.add(tuple(halves))
    weights = torch.tensor([0.7**age for age in (3, 2, 1, 0)], dtype=torch.float64)
    for half in (0, 1):
        expected = sum(w * whole(step[half]) for w, step in zip(weights, steps, strict=True)) / weights.sum()
        torch.testing.assert_close(whole(found[half]), expected)
    assert RunningHalves(0.0).add(tuple(steps[0])) == tuple(steps[0])


def test_a_step_without_halves_ages_those_before():
    """As if every step had been added, at ages 5, 3 and 0."""
    steps = [vectors(seed, num=4)[:2] for seed in range(3)]
    running = RunningHalves(0.7)
    running.skip()  # before there is anything to age
    for skipped, halves in zip((0, 1, 2), steps, strict=True):
        for _ in range(skipped):
            running.skip()
        found = running.add(tuple(halves))
    weights = torch.tensor([0.7**age for age in (5, 3, 0)], dtype=torch.float64)
    for half in (0, 1):
        expected = sum(w * whole(step[half]) for w, step in zip(weights, steps, strict=True)) / weights.sum()
        torch.testing.assert_close(whole(found[half]), expected)


def test_difference_and_mean():
    found = difference(Estimate(0.5, 0.03, 10.0, 64), Estimate(0.4, 0.04, 12.0, 60))
    assert (found.value, found.stderr, found.dof) == pytest.approx((0.1, 0.05, 10.0))
    assert mean_of(({"a": torch.ones(2)}, {"a": torch.zeros(2)}))["a"].tolist() == [0.5, 0.5]
