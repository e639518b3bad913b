"""Measured and predicted entropy changes: loops, autograd, enumeration, order of the remainder, standard errors."""

import math

import pytest
import torch
from entropy_oracles import curvature_from_hessian_vector_product, ratio_surrogate, tangent_terms_from_dot_products
from hypothesis import given
from hypothesis import strategies as st
from tiny_policy import TinyPolicy, loglog_slope, multisets

from trl_entropy.estimators.entropy_change.delta_entropy import (
    RatioTerms,
    critical_length,
    critical_step,
    delta_linear,
    delta_measured,
    delta_second_order,
    delta_trapezoid,
    entropy_terms,
    policy_entropy,
    second_tangent_terms,
    tangent_terms,
)
from trl_entropy.estimators.entropy_change.surrogate import surrogate_terms
from trl_entropy.estimators.statistics.importance import importance_weights

FORMS = ["decision", "sequence"]
POLICY = TinyPolicy()


def take(terms, rows):
    return RatioTerms(*(vector[rows] for vector in terms))


def terms_at(theta, form, sampler=POLICY.theta, direction=POLICY.update):
    """`entropy_terms` and their first and second tangents along `direction`, of every outcome, drawn at `sampler`."""

    def along(moved):
        return torch.func.jvp(POLICY.score, (moved,), (direction,))

    ((entropy, logps), (d_entropy, d_logps)), (_, (dd_entropy, dd_logps)) = torch.func.jvp(
        along, (theta,), (direction,)
    )
    mask = POLICY.completion_mask
    weights = importance_weights(logps, POLICY.score(sampler)[1], mask, form)
    return (
        entropy_terms(entropy, weights, mask),
        tangent_terms(entropy, d_entropy, d_logps, weights, mask, form),
        second_tangent_terms((entropy, d_entropy, dd_entropy), (d_logps, dd_logps), weights, mask, form),
    )


def ratio_on(rows, form, sampler=POLICY.theta):
    """(T6) on given completions as a function of theta, for autograd."""

    def ratio(theta):
        entropy, logps = POLICY.score(theta)
        weights = importance_weights(logps, POLICY.score(sampler)[1], POLICY.completion_mask, form)
        numerator, denominator = (v[rows].sum() for v in entropy_terms(entropy, weights, POLICY.completion_mask))
        return numerator / denominator

    return ratio


@pytest.fixture(scope="module")
def sample():
    return POLICY.sample(6, 4, torch.Generator().manual_seed(1))


@pytest.mark.parametrize("form", FORMS)
def test_measured_change_against_loops(sample, form):
    rows, _ = sample
    (entropy, before), (moved_entropy, after) = (POLICY.score(POLICY.theta + s * POLICY.update) for s in (0.0, 1.0))
    sums = [0.0] * 4
    for i in rows.tolist():
        length = int(POLICY.num_tokens[i])
        for k in range(length):
            log_weight = sum(float(after[i, j] - before[i, j]) for j in range(k if form == "decision" else length))
            for n, term in enumerate((float(entropy[i, k]), 1.0, math.exp(log_weight) * float(moved_entropy[i, k]))):
                sums[n] += term
            sums[3] += math.exp(log_weight)
    (before_terms, *_), (after_terms, *_) = (terms_at(POLICY.theta + s * POLICY.update, form) for s in (0.0, 1.0))
    measured = delta_measured(take(before_terms, rows), take(after_terms, rows))
    assert float(measured.value) == pytest.approx(sums[2] / sums[3] - sums[0] / sums[1], rel=1e-12)
    assert float(policy_entropy(take(before_terms, rows)).value) == pytest.approx(sums[0] / sums[1], rel=1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_influence_of_the_measured_change_is_that_of_theory(sample, form):
    """z_i = sum_k w (H' - h') / mean(sum w) - sum_k (H - h) / mean(T), written out; the error by deleting prompts."""
    rows, prompt_index = sample
    (before, *_), (after, *_) = (terms_at(POLICY.theta + s * POLICY.update, form) for s in (0.0, 1.0))
    z = 0.0
    for sign, terms in ((-1, take(before, rows)), (1, take(after, rows))):
        h = terms.numerator.sum() / terms.denominator.sum()
        z = z + sign * (terms.numerator - h * terms.denominator) / terms.denominator.mean()
    measured = delta_measured(take(before, rows), take(after, rows))
    torch.testing.assert_close(measured.influence, z, rtol=1e-10, atol=1e-14)
    kept = [rows[prompt_index != p] for p in range(6)]
    without = torch.stack([delta_measured(take(before, some), take(after, some)).value for some in kept])
    estimate = measured.estimate(prompt_index)
    assert estimate.stderr == pytest.approx(math.sqrt(5 / 6 * float((without - without.mean()).square().sum())))
    first_order = math.sqrt(sum(float(z[prompt_index == p].sum()) ** 2 for p in range(6)) * 6 / 5) / len(rows)
    assert estimate.stderr == pytest.approx(first_order, rel=0.3)
    assert (estimate.dof, estimate.num_samples) == (5, 24)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("step", [0.0, 1.0])
def test_tangents_are_the_derivatives_of_the_reweighted_ratio_on_the_same_samples(sample, form, step):
    """(T8), (T10): gradient and Hessian of (T6) by autograd, at theta and away from it where weights are not 1."""
    rows, theta = sample[0], POLICY.theta + step * POLICY.update
    terms, tangents, second = (take(t, rows) for t in terms_at(theta, form))
    ratio = ratio_on(rows, form)
    slope = POLICY.update @ torch.autograd.functional.jacobian(ratio, theta)
    curvature = POLICY.update @ torch.autograd.functional.hessian(ratio, theta) @ POLICY.update
    linear, quadratic = delta_linear(terms, tangents), delta_second_order(terms, tangents, second)
    assert float(linear.value) == pytest.approx(float(slope), rel=1e-10)
    assert 2 * float(quadratic.value - linear.value) == pytest.approx(float(curvature), rel=1e-9)
    assert abs(curvature) > 1e-3


def predictions(rows, form, step):
    before, tangents, second = (take(t, rows) for t in terms_at(POLICY.theta, form, direction=step * POLICY.update))
    after, tangents_after, _ = (
        take(t, rows) for t in terms_at(POLICY.theta + step * POLICY.update, form, direction=step * POLICY.update)
    )
    return {
        "measured": delta_measured(before, after),
        "linear": delta_linear(before, tangents),
        "second_order": delta_second_order(before, tangents, second),
        "trapezoid": delta_trapezoid(before, tangents, after, tangents_after),
    }


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("name", "order"), [("linear", 2), ("second_order", 3), ("trapezoid", 3)])
def test_order_of_the_remainder_in_the_step(sample, form, name, order):
    steps = [2.0**-n for n in range(4, 10)]
    values = [predictions(sample[0], form, step) for step in steps]
    remainders = [float(v[name].value - v["measured"].value) for v in values]
    assert loglog_slope(steps, remainders) == pytest.approx(order, abs=0.05)


@pytest.mark.parametrize("form", FORMS)
def test_trapezoid_without_the_weights_keeps_a_second_order_error(sample, form):
    """The feature taken away: tangents at theta + dtheta as if the completions had been drawn there."""
    steps, remainders = [2.0**-n for n in range(4, 10)], []
    for step in steps:
        moved, direction = POLICY.theta + step * POLICY.update, step * POLICY.update
        before, tangents, _ = (take(t, sample[0]) for t in terms_at(POLICY.theta, form, direction=direction))
        after, unweighted, _ = (take(t, sample[0]) for t in terms_at(moved, form, sampler=moved, direction=direction))
        measured = predictions(sample[0], form, step)["measured"].value
        remainders.append(float(delta_trapezoid(before, tangents, after, unweighted).value - measured))
    assert loglog_slope(steps, remainders) == pytest.approx(2, abs=0.1)


@pytest.mark.parametrize("form", FORMS)
def test_error_of_the_difference_falls_with_the_step_as_the_difference_does(sample, form):
    """The influence of the prediction is the exact derivative of that of the measurement, so they cancel in pairs."""
    steps, errors = [2.0**-n for n in range(4, 9)], {"linear": [], "trapezoid": []}
    for step in steps:
        values = predictions(sample[0], form, step)
        for name in errors:
            errors[name].append((values[name] - values["measured"]).estimate(sample[1]).stderr)
    assert loglog_slope(steps, errors["linear"]) == pytest.approx(2, abs=0.05)
    assert loglog_slope(steps, errors["trapezoid"]) == pytest.approx(3, abs=0.05)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("step", [0.0, 1.0])
def test_dot_products_of_a_reverse_pass_replace_the_tangents(sample, form, step):
    """Per-completion gradients of the surrogate, dotted with the update, give the same value and influences."""
    rows, _ = sample
    theta = POLICY.theta + step * POLICY.update
    terms, tangents, _ = (take(t, rows) for t in terms_at(theta, form))
    weights = importance_weights(POLICY.score(theta)[1], POLICY.score(POLICY.theta)[1], POLICY.completion_mask, form)
    h = float(policy_entropy(terms).value)

    def surrogates(moved):
        scored = [values[rows] for values in POLICY.score(moved)]
        return surrogate_terms(*scored, POLICY.completion_mask[rows], h, weights=weights[rows], form=form)

    contributions = torch.autograd.functional.jacobian(surrogates, theta) @ POLICY.update
    length_change = float(tangents.denominator.sum() / terms.denominator.sum())
    stand_in = tangent_terms_from_dot_products(contributions, terms, length_change)
    expected, got = (delta_linear(terms, t) for t in (tangents, stand_in))
    torch.testing.assert_close(got.value, expected.value)
    torch.testing.assert_close(got.influence, expected.influence)
    without = delta_linear(terms, tangent_terms_from_dot_products(contributions, terms))
    torch.testing.assert_close(without.value, expected.value)
    assert float((without.influence - expected.influence).norm() / expected.influence.norm()) > 1e-3


@pytest.mark.parametrize("form", FORMS)
def test_curvature_from_a_hessian_vector_product(sample, form):
    rows = sample[0]
    terms, tangents, second = (take(t, rows) for t in terms_at(POLICY.theta, form))
    linear = delta_linear(terms, tangents).value
    num_tokens, h = float(terms.denominator.sum()), float(policy_entropy(terms).value)

    def surrogate(theta):
        entropy, logps = (v[rows] for v in POLICY.score(theta))
        sampling_logps = POLICY.score(POLICY.theta)[1][rows]
        mask = POLICY.completion_mask[rows]
        parts = [slice(0, 5), slice(5, None)]  # two micro-batches
        return sum(
            ratio_surrogate(entropy[p], logps[p], sampling_logps[p], mask[p], h, num_tokens, form) for p in parts
        )

    value, gradient = surrogate(POLICY.theta), torch.autograd.functional.jacobian(surrogate, POLICY.theta)
    assert float(value) == pytest.approx(0.0, abs=1e-14)
    assert float(gradient @ POLICY.update) == pytest.approx(float(linear))
    hvp = torch.autograd.functional.hvp(surrogate, POLICY.theta, POLICY.update)[1]
    length_change = tangents.denominator.sum() / num_tokens
    curvature = curvature_from_hessian_vector_product(hvp @ POLICY.update, linear, length_change)
    expected = 2 * (delta_second_order(terms, tangents, second).value - linear)
    assert float(curvature) == pytest.approx(float(expected), rel=1e-9)
    assert float(hvp @ POLICY.update) != pytest.approx(float(expected), rel=1e-3)  # the correction is needed


def test_critical_step_is_where_second_order_equals_first():
    linear, curvature = torch.tensor(-0.3), torch.tensor(0.2)
    eta = float(critical_step(linear, curvature))
    assert abs(eta * -0.3) == pytest.approx(abs(eta**2 * 0.2 / 2))
    assert math.isinf(critical_step(linear, torch.tensor(0.0)))


def test_critical_length_is_the_critical_step_of_the_means():
    """Its value from first and second order; its influence by differences in one completion's weight."""
    generator = torch.Generator().manual_seed(2)
    columns = torch.rand(6, 5, generator=generator, dtype=torch.float64) + 0.5
    pairs = [RatioTerms(*pair) for pair in columns.view(3, 2, 5)]
    found = critical_length(*pairs)
    first = delta_linear(*pairs[:2]).value
    second = delta_second_order(*pairs).value - first
    assert float(found.value) == pytest.approx(float((first / second).abs()))
    many = [RatioTerms(*(torch.cat([column.repeat(10000), column[:1]]) for column in pair)) for pair in pairs]
    slope = (float(critical_length(*many).value) - float(found.value)) * 50001
    assert slope == pytest.approx(float(found.influence[0]), rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("estimand", ["entropy", "linear"])
def test_bias_of_the_ratios_falls_as_one_over_n(estimand):
    """By enumeration of every sample of n completions: bias times n stays, to 10 %."""
    policy = TinyPolicy(max_length=2, num_prompts=1)
    probabilities = policy.probabilities(policy.theta).tolist()
    score = torch.func.jvp(policy.score, (policy.theta,), (policy.update,))
    (entropy, _), (d_entropy, d_logps) = score
    mask, ones = policy.completion_mask, torch.ones_like(entropy)
    terms, tangents = entropy_terms(entropy, ones, mask), tangent_terms(entropy, d_entropy, d_logps, ones, mask)
    exact = {
        "entropy": float(policy.policy_entropy(policy.theta)),
        "linear": float(policy.policy_entropy_gradient(policy.theta) @ policy.update),
    }[estimand]

    def value(rows):
        if estimand == "entropy":
            return float(policy_entropy(take(terms, rows)).value)
        return float(delta_linear(take(terms, rows), take(tangents, rows)).value)

    bias = {n: sum(p * value(rows) for rows, p in multisets(probabilities, n)) - exact for n in (2, 4, 8)}
    scaled = [n * b for n, b in bias.items()]
    assert abs(bias[2]) > 1e-4
    assert scaled[1:] == pytest.approx([scaled[0]] * 2, rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_intervals_cover_and_stated_errors_are_the_scatter(form):
    """32 prompts of 4: measured, predicted, difference. Truth is exact; tolerances are the simulation's own errors."""
    generator, reps = torch.Generator().manual_seed(0), 1000
    (before, tangents, _), (after, *_) = (terms_at(POLICY.theta + s * POLICY.update, form) for s in (0.0, 1.0))
    measured = POLICY.policy_entropy(POLICY.theta + POLICY.update) - POLICY.policy_entropy(POLICY.theta)
    linear = POLICY.policy_entropy_gradient(POLICY.theta) @ POLICY.update
    truth = torch.tensor([measured, linear, linear - measured])
    errors, stated, covered = (torch.zeros(reps, 3, dtype=torch.float64) for _ in range(3))
    for rep in range(reps):
        rows, prompt_index = POLICY.sample(32, 4, generator)
        change = delta_measured(take(before, rows), take(after, rows))
        predicted = delta_linear(take(before, rows), take(tangents, rows))
        for j, estimand in enumerate((change, predicted, predicted - change)):
            estimate = estimand.estimate(prompt_index)
            low, high = estimate.interval()
            errors[rep, j], stated[rep, j] = estimate.value - truth[j], estimate.stderr
            covered[rep, j] = low <= truth[j] <= high
    ratio = stated.square().mean(0).sqrt() / errors.std(0)
    assert (ratio - 1).abs().max() < 0.03 + 3 / math.sqrt(2 * reps)  # 3 %: relative bias of order 1/P
    assert (covered.mean(0) - 0.95).abs().max() < 0.01 + 3 * math.sqrt(0.95 * 0.05 / reps)


def random_tokens(seed, batch=5, length=4):
    """H, dH, ddH, S, S at the sampler, dS, ddS, and a mask with an empty completion."""
    generator = torch.Generator().manual_seed(seed)
    tokens = list(torch.rand(7, batch, length, dtype=torch.float64, generator=generator))
    lengths = torch.randint(1, length + 1, (batch,), generator=generator).index_fill(0, torch.tensor(2), 0)
    return tokens, torch.arange(length) < lengths[:, None]


def all_statistics(tokens, mask, form):
    entropy, d_entropy, dd_entropy, logps, sampling, d_logps, dd_logps = tokens
    weights = importance_weights(logps, sampling, mask, form)
    return torch.stack(
        [
            *entropy_terms(entropy, weights, mask),
            *tangent_terms(entropy, d_entropy, d_logps, weights, mask, form),
            *second_tangent_terms((entropy, d_entropy, dd_entropy), (d_logps, dd_logps), weights, mask, form),
        ],
        1,
    )


@given(st.sampled_from(FORMS), st.integers(0, 99), st.integers(0, 3), st.floats(-50, 50) | st.just(math.nan))
def test_padding_adds_nothing(form, seed, width, filler):
    tokens, mask = random_tokens(seed)
    whole = all_statistics(tokens, mask, form)
    noisy = [torch.nn.functional.pad(t.where(mask, filler), (0, width), value=filler) for t in tokens]
    padded = all_statistics(noisy, torch.nn.functional.pad(mask, (0, width)).long(), form)
    torch.testing.assert_close(padded, whole, rtol=1e-12, atol=1e-12)
    assert whole[2].eq(0).all()  # the empty completion


@given(st.sampled_from(FORMS), st.integers(0, 99), st.permutations(range(5)), st.integers(0, 5))
def test_order_and_micro_batches_change_nothing(form, seed, order, cut):
    tokens, mask = random_tokens(seed)
    prompt_index = torch.tensor([0, 0, 1, 1, 2])
    whole = all_statistics(tokens, mask, form)
    parts = [
        all_statistics([t[order][p] for t in tokens], mask[order][p], form) for p in (slice(0, cut), slice(cut, 5))
    ]
    gathered = torch.cat(parts)

    def change(statistics, index):
        terms = [RatioTerms(statistics[:, j], statistics[:, j + 1]) for j in (0, 2, 4)]
        estimate = delta_second_order(*terms).estimate(index)
        return estimate.value, estimate.stderr

    expected = change(whole, prompt_index)
    assert change(gathered, prompt_index[order]) == pytest.approx(expected, rel=1e-10)
    assert all(map(math.isfinite, expected))


def test_no_token_at_all_is_nan():
    empty = RatioTerms(torch.zeros(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64))
    assert math.isnan(policy_entropy(empty).value)
    assert math.isnan(delta_measured(empty, empty).estimate(torch.arange(3)).stderr)
