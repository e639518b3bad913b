"""Noise scale: unbiased by enumeration of every batch of a tiny policy, planted scales recovered, wrong ways shown."""

import itertools
import math

import pytest
import torch
from first_fast import first_fast
from hypothesis import given
from hypothesis import strategies as st
from tiny_groups import TinyGroups, batches, loss_sums
from tiny_policy import TinyPolicy, multisets
from variance_oracles import noise_parts, unbiased_parts

from trl_entropy.estimators.noise.noise_scale import (
    NoiseScaleRecord,
    group_products,
    half_advantages,
    jackknifed_parts,
    micro_batch_parts,
    noise_parts_two_sizes,
)
from trl_entropy.gradients.loss_coefficients import LossCoefficients

POLICY = TinyPolicy(max_length=1)
GROUPS = TinyGroups(POLICY)
METRICS = [1.0, 1 + POLICY.theta.abs()]


def parts_of(y, metric=1.0):
    """(T14) of the rows Y_n, by way of norms alone."""
    parts = noise_parts((y.square() * metric).sum(1), float((y.mean(0).square() * metric).sum()))
    return torch.tensor(parts, dtype=torch.float64)


def step_of(y, half_products=None):
    return jackknifed_parts(y.square().sum(1), y @ y.mean(0), half_products)


def expectation(function, groups, num_prompts):
    """The mean of a function of row numbers over all batches of `num_prompts` groups."""
    return sum(p * function(rows) for rows, p in multisets(groups.probability.tolist(), num_prompts))


def random_rows(num_prompts=7, dim=5, seed=0):
    return torch.randn(num_prompts, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) + 0.3


@pytest.mark.parametrize("metric", METRICS, ids=["plain", "metric"])
@pytest.mark.parametrize(("groups", "num_prompts"), [(GROUPS, 4), (TinyGroups(TinyPolicy(max_length=2)), 2)])
def test_parts_are_unbiased(groups, num_prompts, metric):
    """(T14) and, with M fixed beforehand, (T16)."""
    y = groups.gradients()
    assert float(groups.probability @ (y == 0).all(1).double()) > 0.1  # groups without gradient are among them
    mean = expectation(lambda rows: parts_of(y[rows], metric), groups, num_prompts)
    assert mean.tolist() == pytest.approx(groups.exact_parts(metric), rel=1e-9)


def test_a_number_of_tokens_may_be_taken_as_given():
    """
    (T14) of a loss divided by the tokens of the batch, against E[g] and P times the variance of g: what the gradient
    of such a step is. |G|^2 misses by O(1/P), and tr(Sigma) by less than 2 CV |G|/sqrt(tr Sigma).
    """
    policy = TinyPolicy(max_length=2, num_prompts=1)
    groups = TinyGroups(policy)
    sums, tokens = loss_sums(policy, groups)
    misses = []
    for num_prompts in (2, 4):
        rows, p = batches(groups.probability, num_prompts)
        y = sums[rows] / tokens[rows].mean(1)[:, None, None]
        g, norms = y.mean(1), y.square().sum(2).mean(1)
        expected = p @ g
        signal, variance = expected.square().sum(), p @ g.square().sum(1) - expected.square().sum()
        found = p @ (num_prompts * g.square().sum(1) - norms) / (num_prompts - 1)
        noise = p @ (norms - g.square().sum(1)) * num_prompts / (num_prompts - 1)
        misses.append(float(found / signal) - 1)
        spread = float((groups.probability @ tokens.square()).sqrt() / (groups.probability @ tokens)) ** 2 - 1
        assert 0 < float(noise / (num_prompts * variance)) - 1 < 2 * (spread * signal / noise) ** 0.5
        assert float(noise / (num_prompts * variance)) == pytest.approx(1.01, abs=0.005)
    assert misses == pytest.approx([-0.0835, -0.0373], abs=1e-3)


def test_two_batch_sizes_are_unbiased():
    """(T15): micro-batches of 2 prompts inside the batch of 4, all ordered batches of one prompt's groups."""
    groups = TinyGroups(TinyPolicy(max_length=1, num_prompts=1))
    y, mean = groups.gradients(), torch.zeros(2, dtype=torch.float64)
    for batch in itertools.product(range(len(y)), repeat=4):
        rows = y[list(batch)]
        small = rows.view(2, 2, -1).mean(1).square().sum(1)
        parts = noise_parts_two_sizes(small, float(rows.mean(0).square().sum()), 2, 4)
        mean += groups.probability[list(batch)].prod() * torch.tensor(parts, dtype=torch.float64)
    assert mean.tolist() == pytest.approx(groups.exact_parts(), rel=1e-9)


def test_micro_batches_pool_what_loops_give():
    """(T15): the parts by (T14) of micro-batches' mean rows, b times its trace; the error from changes over steps."""
    steps = [random_rows(12, seed=seed).view(4, 3, 5).mean(1) for seed in range(4)]
    expected = [parts_of(small) * torch.tensor([1.0, 3.0]) for small in steps]
    pool, parts = NoiseScaleRecord.empty().parts, None
    for small, wanted in zip(steps, expected, strict=True):
        parts, pooled = micro_batch_parts(small.square().sum(1), float(small.mean(0).square().sum()), 12, parts)
        assert parts == pytest.approx(wanted.tolist())
        pool = pool.merge(pooled)
    changes = [after - before for before, after in itertools.pairwise(expected)]
    covariance = sum(torch.outer(change, change) / 2 for change in changes)
    assert torch.allclose(pool.covariance, covariance) and torch.allclose(pool.values, sum(expected[1:]))
    assert (pool.num_steps, pool.num_samples, pool.smallest_dof, pool.total_dof) == (3, 36, 2 / 3, 2.0)
    squares = [float(change[0] ** 2 / 2) for change in changes]
    found = sum(squares) ** 2 / sum(s * s / 2 for s in squares)
    assert NoiseScaleRecord(pool).grad_sq_norm().dof == pytest.approx(min(found, 2.0))
    for norms, previous in ((torch.ones(4), None), (torch.ones(1), parts), (torch.full((4,), torch.nan), parts)):
        assert micro_batch_parts(norms, 0.5, 12, previous)[1].num_steps == 0


@pytest.mark.slow
@pytest.mark.parametrize("planted", [1.0, 30.0, math.inf])
def test_scatter_over_steps_covers_planted_noise_scales(planted):
    """(T15), 20 steps of 8 micro-batches of 4 prompts, 200 times."""
    generator, intervals = torch.Generator().manual_seed(0), []
    signal, noise = (0.0, 1.0) if math.isinf(planted) else (1.0, planted)
    for _ in range(200):
        record, parts = NoiseScaleRecord.empty(), None
        for _ in range(20):
            rows = torch.randn(8, 64, generator=generator, dtype=torch.float64) * (noise / 64 / 4) ** 0.5
            rows[:, 0] += signal
            norms, batch_sq_norm = rows.square().sum(1), float(rows.mean(0).square().sum())
            parts, pooled = micro_batch_parts(norms, batch_sq_norm, 32, parts)
            record = record.merge(NoiseScaleRecord(pooled))
        intervals.append(record.interval())
    assert sum(low <= planted <= high for low, high in intervals) / 200 > 0.92
    if math.isinf(planted):  # 640 prompts without a signal rule out noise scales below 50 or so
        assert sorted(low for low, _ in intervals)[100] > 50
    else:  # bounded, and right within a factor of 2
        assert all(planted / 2 < low and high < 2 * planted for low, high in intervals)


def test_formulas_of_theory_against_loops():
    y = random_rows().tolist()
    num = len(y)
    dot = [[sum(a * b for a, b in zip(n, m, strict=True)) for m in y] for n in y]
    pairs = [(n, m) for n in range(num) for m in range(num) if n != m]
    signal = sum(dot[n][m] for n, m in pairs) / len(pairs)
    noise = sum(dot[n][n] - 2 * dot[n][m] + dot[m][m] for n, m in pairs) / (2 * len(pairs))
    assert parts_of(torch.tensor(y)).tolist() == pytest.approx([signal, noise])
    norms = torch.tensor([dot[n][n] for n in range(num)])
    two = noise_parts_two_sizes(norms, sum(map(sum, dot)) / num**2, 1, num)
    assert two == pytest.approx((signal, noise))


def test_jackknife_deletes_one_prompt():
    """From |Y_n|^2, Y_n . g and the halves' products, what comes of deleting rows and starting over."""
    y, halves = random_rows(), random_rows(seed=1)[:, 0]
    step = step_of(y, halves)
    left_out = []
    for n in range(len(y)):
        kept = [m for m in range(len(y)) if m != n]
        signal, noise = parts_of(y[kept])
        left_out.append(torch.stack([signal, noise, halves[kept].mean() - signal]))
    centred = torch.stack(left_out) - torch.stack(left_out).mean(0)
    torch.testing.assert_close(step.covariance, 6 / 7 * centred.T @ centred)
    assert step.values[:2].tolist() == pytest.approx(parts_of(y).tolist())


def test_covariances_by_enumeration():
    """With pairs known the covariance is unbiased; the jackknife's is larger for |G|^2 and just so for |Y|^2."""
    groups, num = TinyGroups(TinyPolicy(max_length=1, num_prompts=1)), 5
    gram = groups.gradients() @ groups.gradients().T
    batches = [(gram[rows][:, rows], p) for rows, p in multisets(groups.probability.tolist(), num)]
    values = [(unbiased_parts(g).values, p) for g, p in batches]
    mean = sum(p * v for v, p in values)
    exact = sum(p * (v - mean).outer(v - mean) for v, p in values)
    stated = sum(p * unbiased_parts(g).covariance for g, p in batches)
    jackknife = sum(p * jackknifed_parts(g.diagonal(), g.mean(1)).covariance for g, p in batches)
    torch.testing.assert_close(stated, exact, rtol=1e-9, atol=0)
    ones = torch.ones(2, dtype=torch.float64)  # |G|^2 + tr(Sigma) = mean |Y|^2
    assert float(ones @ jackknife @ ones) == pytest.approx(float(ones @ exact @ ones))
    assert 1.0 < float(jackknife[0, 0] / exact[0, 0]) < 2 * (num - 1) / (num - 2)


def test_completions_taken_as_independent_are_wrong():
    """Their advantages sum to zero and they share a prompt: (T14) over completions misses both parts."""
    per_completion = GROUPS.completion_gradients()
    signal, noise = GROUPS.exact_parts()
    mean = expectation(lambda rows: parts_of(per_completion[rows].flatten(0, 1)), GROUPS, 3)
    assert abs(mean[0] / signal - 1) > 0.1
    in_prompts = float(mean[1] / mean[0]) / per_completion.shape[1]
    assert abs(in_prompts / (noise / signal) - 1) > 0.5


def test_a_window_of_past_gradients_is_wrong():
    """Gradients of several steps are no draws of one distribution: the drift of G is read as noise, exactly so."""
    steps = [TinyGroups(POLICY, theta=sharpening * POLICY.theta) for sharpening in (1.0, 3.0)]
    rows, laws = [s.gradients() for s in steps], [s.probability for s in steps]
    mean = sum(
        laws[0][i] * laws[1][j] * parts_of(torch.stack([rows[0][i], rows[1][j]]))
        for i, j in itertools.product(range(len(rows[0])), range(len(rows[1])))
    )
    signal, noise = (sum(s.exact_parts()[k] for s in steps) / 2 for k in range(2))
    drift = float((laws[0] @ rows[0] - laws[1] @ rows[1]).square().sum()) / 2
    assert mean.tolist() == pytest.approx([signal - drift, noise + drift])
    assert drift > 0.2 * signal


def test_a_window_reads_its_own_length_where_noise_dominates():
    """The plug-in ratio of W past batch gradients reads (W - 1) P prompts at most, whatever the noise scale is."""
    num_prompts, window, planted = 8, 5, 1000.0
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(window * num_prompts, 20_000, generator=generator, dtype=torch.float64) / 20_000**0.5
    rows = planted**0.5 * noise
    rows[:, 0] += 1
    past = rows.view(window, num_prompts, -1).mean(1)
    mean_sq, sq_mean = float(past.square().sum(1).mean()), float(past.mean(0).square().sum())
    read = num_prompts * (mean_sq - sq_mean) / sq_mean
    assert read == pytest.approx((window - 1) * num_prompts, rel=0.1) and read < planted / 20
    record = NoiseScaleRecord.empty()
    for batch in rows.view(window, num_prompts, -1):
        record = record.update(step_of(batch))
    low, high = record.interval()
    assert low < planted < high


def test_this_steps_gradient_in_the_metric_is_wrong():
    """(T16) with v_hat of after the step: off even from the mean of that metric over all batches."""
    y, before = GROUPS.gradients(), 1e-4

    def metric(rows):
        return 1 / (0.9 * before + 0.1 * y[rows].mean(0).square()).sqrt()

    mean = expectation(lambda rows: parts_of(y[rows], metric(rows)), GROUPS, 3)
    exact = GROUPS.exact_parts(expectation(metric, GROUPS, 3))
    assert abs(mean[0] / exact[0] - 1) > 0.1
    assert abs(mean[1] / exact[1] - 1) > 0.1


def test_groups_without_gradient_stay():
    """They count in P: dropping them from the batches gives the noise scale of another distribution."""
    y, p = GROUPS.gradients(), GROUPS.probability
    moving = (y != 0).any(1)
    kept_share = float(p[moving].sum())
    kept = (p[moving] / kept_share).tolist()
    all_signal, all_noise = expectation(lambda rows: step_of(y[rows]).values, GROUPS, 3)
    few_signal, few_noise = sum(q * step_of(y[moving][rows]).values for rows, q in multisets(kept, 3))
    # p of the groups have a gradient: G = p G_kept, and tr(Sigma) = p tr(Sigma_kept) + p (1-p) |G_kept|^2
    assert float(all_signal) == pytest.approx(kept_share**2 * float(few_signal))
    assert float(all_noise) == pytest.approx(
        kept_share * float(few_noise) + kept_share * (1 - kept_share) * float(few_signal)
    )
    assert float(few_noise / few_signal) < 0.9 * float(all_noise / all_signal)


@pytest.mark.slow
def test_split_by_prompt_is_unbiased():
    """Both halves' gradients expect the group's, given the prompt; their product is |E[Y | prompt]|^2."""
    groups = TinyGroups(POLICY, size=4, halves=True)
    y, p = groups.gradients(), groups.probability
    advantages = half_advantages(groups.rewards)
    mask = torch.tensor([1.0, 1, 0, 0], dtype=torch.float64)
    first, second = groups.gradients(advantages * mask), groups.gradients(advantages * (1 - mask))
    signal, noise = groups.exact_parts()
    means = [(p * (groups.prompt == q)) @ y * 2 for q in range(2)]
    for half in (first, second):
        for q in range(2):
            torch.testing.assert_close((p * (groups.prompt == q)) @ half * 2, means[q], rtol=1e-10, atol=1e-12)
    products = (first * second).sum(1)
    exact = sum(float(m.square().sum()) for m in means) / 2 - signal

    def between(rows):
        return step_of(y[rows], products[rows]).values[2]

    assert float(expectation(between, groups, 2)) == pytest.approx(exact, rel=1e-9)
    assert 0.01 < exact / noise < 0.99
    plain = groups.rewards - groups.rewards.mean(
        1, keepdim=True
    )  # with the group's own mean the halves are not independent
    wrong = (groups.gradients(2 * plain * mask) * groups.gradients(2 * plain * (1 - mask))).sum(1)
    assert abs(float(p @ wrong) - signal - exact) > 0.1 * exact


def test_half_advantages_go_into_the_loss():
    """They take the place of A_i in (T2); an odd group splits into G // 2 and the rest."""
    rewards = torch.tensor([[1.0, 0, 0, 1, 1]])
    advantages = half_advantages(rewards)
    others = [rewards[0, [j for j in half if j != i]].mean() for half in ([0, 1], [2, 3, 4]) for i in half]
    sizes = torch.tensor([2.0, 2, 3, 3, 3])
    torch.testing.assert_close(advantages[0], (4 * (rewards[0] - torch.stack(others)) / sizes).double())
    logps, mask = torch.zeros(2, 3, requires_grad=True), torch.ones(2, 3, dtype=torch.long)
    coefficients = LossCoefficients.on_policy(advantages[0, :2], mask, 5, 3)
    loss = coefficients.surrogate(torch.zeros(2, 3), logps, mask, torch.arange(2))
    (grad,) = torch.autograd.grad(loss, logps)
    torch.testing.assert_close(grad[:, 0].double(), -advantages[0, :2] / 15)
    with pytest.raises(ValueError, match="4 completions"):
        half_advantages(torch.zeros(2, 3))


def simulate(noise_scale, num_runs=60, num_steps=8, num_prompts=16, dim=64, pairs=False):
    """Records of runs in which |G|^2 = 1 and tr(Sigma) = noise_scale; inf: |G|^2 = 0."""
    generator = torch.Generator().manual_seed(int(10 * min(noise_scale, 1e6)))
    shape = (num_runs, num_steps, num_prompts, dim)
    y = torch.randn(shape, generator=generator, dtype=torch.float64) / math.sqrt(dim)
    if math.isfinite(noise_scale):
        y = y * math.sqrt(noise_scale)
        y[..., 0] += 1
    records = []
    for run in y:
        record = NoiseScaleRecord.empty()
        for step in run:
            record = record.update(unbiased_parts(step @ step.T) if pairs else step_of(step))
        records.append(record)
    return records


@pytest.mark.parametrize("noise_scale", first_fast([0.1, 1.0, 10.0, 100.0, 1000.0]))
def test_planted_noise_scale_is_covered(noise_scale):
    """60 runs of 8 steps: 95 % intervals hold the truth in 53 or more (a 1-in-300 event for coverage 0.95)."""
    intervals = [record.interval() for record in simulate(noise_scale)]
    assert sum(low <= noise_scale <= high for low, high in intervals) >= 53
    if noise_scale <= 10:  # 128 prompts tell: bounded, and right within a factor of 3
        assert all(noise_scale / 3 < low and high < 3 * noise_scale for low, high in intervals)
    else:  # many have no upper end, but all rule out small scales
        assert all(low > 20 for low, _ in intervals)


@pytest.mark.slow
def test_pooled_parts_recover_a_large_scale():
    """All 480 steps of the 60 runs together, with pairs: noise scale 100 within its error, that below a fifth."""
    records = simulate(100.0, pairs=True)
    whole = NoiseScaleRecord.empty()
    for record in records:
        whole = whole.merge(record)
    estimate = whole.noise_scale()
    assert abs(estimate.value - 100) < 3 * estimate.stderr < 60
    low, high = whole.suggested_num_prompts(efficiency=0.8)
    assert (low / 4, high / 4) == pytest.approx(whole.interval())
    assert low < 400 < high
    assert whole.signal_to_noise(16).value == pytest.approx(16 / estimate.value)


def test_division_before_pooling_is_wrong():
    ratios = sorted(record.noise_scale().value for record in simulate(1000.0, num_steps=1))
    assert ratios[0] < 0 < 1000 > 3 * abs(ratios[len(ratios) // 2])


@pytest.mark.parametrize("pairs", first_fast([False, True]))
def test_pure_noise_has_no_signal(pairs):
    """|G|^2 is consistent with 0, negative as often as not, and no finite noise scale is an upper bound."""
    records = simulate(math.inf, pairs=pairs)
    estimates = [record.grad_sq_norm() for record in records]
    assert sum(low <= 0 <= high for low, high in (e.interval() for e in estimates)) >= 53
    assert 15 < sum(e.value < 0 for e in estimates) < 45
    mean = sum(e.value for e in estimates) / 60
    assert abs(mean) < 3 * (sum(e.stderr**2 for e in estimates)) ** 0.5 / 60
    assert sum(math.isinf(record.interval()[1]) for record in records) >= 53
    assert all(record.variance_trace().value == pytest.approx(1, rel=0.2) for record in records)


def test_split_of_a_record():
    """E[Y | prompt] of variance 2 and the rest of variance 1, over 50 steps of 16 prompts."""
    generator = torch.Generator().manual_seed(3)
    record = NoiseScaleRecord.empty(with_halves=True)
    for _ in range(50):
        shape = (2, 16, 32)
        a, b = torch.randn(shape, generator=generator, dtype=torch.float64) / math.sqrt(16)
        prompt = torch.randn(16, 32, generator=generator, dtype=torch.float64) / math.sqrt(16)
        y = 1 / math.sqrt(32) + prompt + (a + b) / 2
        record = record.update(
            step_of(y, ((1 / math.sqrt(32) + prompt + a) * (1 / math.sqrt(32) + prompt + b)).sum(1))
        )
    for estimate, truth in [
        (record.between_prompt_trace(), 2.0),
        (record.within_prompt_trace(), 1.0),
        (record.between_prompt_share(), 2 / 3),
        (record.noise_scale(), 3.0),
    ]:
        assert abs(estimate.value - truth) < 3 * estimate.stderr < truth / 2
        assert 500 < estimate.dof < 750 and estimate.num_samples == 800


@given(st.permutations(range(6)), st.integers(0, 9))
def test_order_of_prompts_and_of_steps_does_not_matter(order, seed):
    y, z = random_rows(6, seed=seed), random_rows(5, seed=seed + 10)
    one = NoiseScaleRecord.empty().update(step_of(y)).update(step_of(z))
    other = NoiseScaleRecord.empty().update(step_of(z)).merge(NoiseScaleRecord.empty().update(step_of(y[order])))
    torch.testing.assert_close(one.parts.values, other.parts.values)
    torch.testing.assert_close(one.parts.covariance, other.parts.covariance)
    torch.testing.assert_close(one.parts.squares, other.parts.squares)
    assert (other.parts.num_steps, other.parts.num_samples) == (2, 11)
    assert (other.parts.smallest_dof, other.parts.total_dof) == (4.0, 9.0)


@pytest.mark.parametrize("num_prompts", [1, 2, 3])
def test_too_few_prompts(num_prompts):
    y = random_rows(num_prompts)
    record = NoiseScaleRecord.empty().update(step_of(y))
    assert math.isnan(record.grad_sq_norm().value) == (num_prompts == 1)
    assert math.isnan(record.interval()[0]) == math.isnan(record.noise_scale().stderr) == (num_prompts < 3)
    assert unbiased_parts(y @ y.T).covariance.isnan().any()
    with pytest.raises(ValueError, match="half_products"):
        record.between_prompt_trace()


def test_negative_parts_are_data():
    y = torch.tensor([[1.0], [-1], [1], [-1]])
    assert tuple(parts_of(y)) == pytest.approx((-1 / 3, 4 / 3))
    assert NoiseScaleRecord.empty().update(step_of(y)).interval()[1] == math.inf
    assert tuple(parts_of(torch.ones(3, 1))) == (1.0, 0.0)


@pytest.mark.parametrize("columns", [2**13, 7])
def test_products_of_rows_are_those_of_loops(columns, monkeypatch):
    monkeypatch.setattr("trl_entropy.estimators.noise.noise_scale._BLOCK", columns)
    generator = torch.Generator().manual_seed(0)
    rows, metric = torch.randn(3, 50, generator=generator), torch.rand(50, generator=generator)
    g = rows.mean(0)
    metrics = (None, metric)
    for m, products in zip(metrics, group_products(rows, g, metrics), strict=True):
        weights = torch.ones(50) if m is None else m
        for n in range(3):
            assert products.sq_norms[n] == pytest.approx(
                sum(float(w * y) * float(y) for w, y in zip(weights, rows[n], strict=True)), rel=1e-5
            )
            assert products.dot_batch[n] == pytest.approx(float((weights * rows[n]) @ g), rel=1e-4, abs=1e-5)
