"""Parts, completions and tokens of the entropy change add up to grad h . dtheta of torch's own AdamW step (T9)."""

import functools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_groups import LENGTH, rewards_of
from tiny_step import TinyStep

from trl_entropy.estimators.attribution.shares import (
    Attribution,
    CategoryRecord,
    bin_index,
    category_sums,
    completion_contributions,
    crossed,
    kl_coefficients,
    on_policy_coefficients,
    token_contributions,
    update_products,
)
from trl_entropy.estimators.entropy_change.surrogate import surrogate_terms
from trl_entropy.estimators.optimizer.adamw import UpdateParts

NAMES = ["correct/rare", "correct/common", "incorrect/rare", "incorrect/common"]


@functools.cache
def tiny_step(seed=0):
    return TinyStep(seed)


def entropy_gradient(step):
    return step.policy.policy_entropy_gradient(step.theta)


def tokens_of(step):
    """delta_ik with the exact grad h, D_ik from a forward-mode pass."""
    direction = step.metric * entropy_gradient(step)
    _, derivatives = torch.func.jvp(lambda theta: step.policy.score(theta)[1], (step.theta,), (direction,))
    return token_contributions(step.alpha, derivatives[step.rows], step.mask, step.coefficient)


@pytest.mark.parametrize("seed", range(4))
def test_parts_sum_to_the_whole(seed):
    step = tiny_step(seed)
    grad_h = entropy_gradient(step)
    completions = completion_contributions((step.gradients * step.metric) @ grad_h, step.coefficient)
    products = update_products([(grad_h, step.parts)])
    whole = float(grad_h @ step.update)
    attribution = Attribution(whole, products.momentum, products.weight_decay, completions)
    assert abs(attribution.rounding) < 1e-12 < 1e-4 * abs(whole)
    assert products.gradient == pytest.approx(float(completions.sum()), abs=1e-13)
    assert all(abs(part) > 1e-5 for part in products)
    torch.testing.assert_close(tokens_of(step).sum(1), completions, rtol=0, atol=1e-13)


def test_parts_of_the_reward_sum_to_the_whole_and_are_what_leaving_a_completion_out_changes():
    """(T22), with the exact grad J; leaving out at a hundredth of the step, M held, by exact expected rewards."""
    step = tiny_step()
    policy, rewards, theta = step.policy, rewards_of(step.policy), step.theta

    def expected(at):
        return policy.probabilities(at) @ rewards

    grad_j = torch.autograd.functional.jacobian(expected, theta)
    completions = completion_contributions((step.gradients * step.metric) @ grad_j, step.coefficient)
    products, whole = update_products([(grad_j, step.parts)]), float(grad_j @ step.update)
    attribution = Attribution(whole, products.momentum, products.weight_decay, completions)
    assert abs(attribution.rounding) < 1e-12 < 1e-4 * abs(whole)
    own = -step.coefficient * step.gradients * step.metric
    without = torch.stack([expected(theta + (step.update - part) / 100) for part in own])
    left_out = expected(theta + step.update / 100) - without
    assert float(torch.corrcoef(torch.stack([left_out, completions]))[0, 1]) > 0.99
    torch.testing.assert_close(100 * left_out, completions, rtol=0.05, atol=1e-3 * float(completions.abs().max()))


def test_what_is_not_named_is_rounding():
    """A bonus in the loss belongs to no completion: named it is a part, unnamed it shows in the remainder."""
    completions = torch.tensor([0.25, -1.0])
    assert Attribution(1.0, 0.5, -0.25, completions).rounding == 1.5
    assert Attribution(1.0, 0.5, -0.25, completions, {"bonus": torch.tensor([2.0, -0.5])}).rounding == 0.0
    found = Attribution(1.0, 0.5, -0.25, completions)
    assert found.relative_rounding == pytest.approx(1.5 / (0.75 + float(completions.abs().sum())))
    assert found.share(found.momentum) == 0.5 and math.isnan(Attribution(0.0, 0.0, 0.0, completions).share(0.0))


def test_products_add_over_parameters():
    step = tiny_step()
    pieces = zip(*(part.split([5, 7]) for part in step.parts), entropy_gradient(step).split([5, 7]), strict=True)
    found = update_products((grad_h, UpdateParts(*parts)) for *parts, grad_h in pieces)
    assert found == pytest.approx(update_products([(entropy_gradient(step), step.parts)]))
    assert update_products([]) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize("per_token", [False, True])
def test_coefficients_are_the_derivative_of_the_loss(per_token):
    """alpha of (T2) by automatic differentiation at ratio 1."""
    step = tiny_step()
    advantages = step.advantages[:, None] * torch.linspace(0.5, 1.5, 3) if per_token else step.advantages
    logps = step.policy.score(step.theta)[1][step.rows].requires_grad_()
    ratio = (logps - logps.detach()).exp()
    weights = advantages if per_token else advantages[:, None]
    clipped = torch.minimum(ratio * weights, ratio.clamp(0.8, 1.2) * weights)
    loss = -(clipped * step.mask).sum() / (16 * LENGTH)
    (grad,) = torch.autograd.grad(loss, logps)
    torch.testing.assert_close(on_policy_coefficients(advantages, step.mask, 16, LENGTH), -grad)
    if not per_token:
        torch.testing.assert_close(-grad, step.alpha)
    half = on_policy_coefficients(advantages[:5], step.mask[:5], 16, LENGTH)  # of a micro-batch, in which 5 of 16 are
    assert torch.equal(half, on_policy_coefficients(advantages, step.mask, 16, LENGTH)[:5])


def test_contributions_are_unbiased_over_the_probe_batch():
    """Every completion of E in turn, with h and E[T] given, U and M held: the mean is that of the exact grad h."""
    step = tiny_step()
    policy, theta = step.policy, step.theta
    h, p = float(policy.policy_entropy(theta)), policy.probabilities(theta)

    def terms(moved):
        return surrogate_terms(*policy.score(moved), policy.completion_mask, h) / policy.mean_length(theta)

    rows_of_e = torch.autograd.functional.jacobian(terms, theta)
    products = (step.gradients * step.metric) @ rows_of_e.T
    each = torch.stack([completion_contributions(column, step.coefficient) for column in products.T])
    torch.testing.assert_close(p @ each, tokens_of(step).sum(1), rtol=1e-10, atol=1e-14)


def categories_of(step):
    correct = bin_index(step.rewards, [1.0])[:, None].expand(step.mask.shape)
    common = bin_index(step.policy.score(step.theta)[1][step.rows], [math.log(0.3)])
    return crossed(1 - correct, common, 2)


def record_of(seeds):
    record = CategoryRecord.empty(NAMES)
    for seed in seeds:
        step = tiny_step(seed)
        sums, counts = category_sums(tokens_of(step), categories_of(step), step.mask, step.prompt_index, 4, 4)
        record = record.update(sums, counts)
    return record


def test_categories_against_loops():
    step = tiny_step()
    tokens, logps = tokens_of(step), step.policy.score(step.theta)[1][step.rows]
    sums, counts = category_sums(tokens, categories_of(step), step.mask, step.prompt_index, 4, 4)
    expected, number = torch.zeros(4, 4, dtype=torch.float64), [0] * 4
    for i in range(16):
        for k in range(int(step.mask[i].sum())):
            name = ("" if step.rewards[i] >= 1 else "in") + "correct/"
            name += "rare" if logps[i, k].exp() < 0.3 else "common"
            expected[step.prompt_index[i], NAMES.index(name)] += tokens[i, k]
            number[NAMES.index(name)] += 1
    torch.testing.assert_close(sums, expected)
    assert counts.tolist() == number
    assert min(number) > 0


def test_shares_pool_before_they_divide():
    record, steps = record_of(range(4)), [record_of([seed]) for seed in range(4)]
    change = sum(step.change(*NAMES).value for step in steps)
    rare_wrong = sum(step.change("incorrect/rare").value for step in steps)
    assert record.share("incorrect/rare").value == pytest.approx(rare_wrong / change)
    assert sum(record.share(name).value for name in NAMES) == pytest.approx(1)
    assert sum(record.token_share(name) for name in NAMES) == pytest.approx(1)
    assert record.share(*NAMES).stderr == pytest.approx(0, abs=1e-9)
    assert record.change("correct/rare").value == pytest.approx(
        sum(step.change("correct/rare").value for step in steps) / 4
    )
    both = steps[0].merge(steps[1]).merge(steps[2].merge(steps[3]))
    torch.testing.assert_close(both.parts.covariance, record.parts.covariance)
    assert both.counts.tolist() == record.counts.tolist()


def test_share_interval_covers():
    """The claim of Cui et al. planted at 0.4 of a drop, prompts with noise of their own: 200 runs of 5 steps."""
    generator, covered, signs = torch.Generator().manual_seed(0), 0, []
    truth = torch.tensor([0.1, 0.3, 0.4, 0.2], dtype=torch.float64)
    for _ in range(200):
        record = CategoryRecord.empty(NAMES)
        for _ in range(5):
            noise = torch.randn(16, 4, generator=generator, dtype=torch.float64) * 0.3
            scale = torch.rand(16, 1, generator=generator, dtype=torch.float64) * 2
            record = record.update(-scale * truth + noise, torch.ones(4, dtype=torch.long))
        low, high = record.share_interval("incorrect/rare")
        covered += low <= 0.4 <= high
        signs.append(record.share("incorrect/rare").value)
    assert 180 <= covered <= 199
    assert sum(signs) / 200 == pytest.approx(0.4, abs=0.02)


def test_no_change_has_no_shares():
    """Contributions that cancel: the share is a number without meaning, and its interval says so."""
    sums = torch.randn(16, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    record = CategoryRecord.empty(NAMES).update(sums, torch.ones(4, dtype=torch.long))
    assert record.share_interval("incorrect/rare") == (-math.inf, math.inf)


def test_unknown_and_other_categories_are_refused():
    record = record_of([0])
    with pytest.raises(ValueError, match="no categories"):
        record.share("wrong")
    with pytest.raises(ValueError, match="different categories"):
        record.merge(CategoryRecord.empty(["all"]))


@given(st.lists(st.floats(-3, 3), min_size=1, max_size=20))
def test_bins(values):
    edges = [-1.0, 0.0, 2.0]
    expected = [sum(edge <= value for edge in edges) for value in torch.tensor(values, dtype=torch.float64).tolist()]
    assert bin_index(torch.tensor(values, dtype=torch.float64), edges).tolist() == expected


@given(st.permutations(range(16)), st.integers(1, 15))
def test_micro_batches_and_order_do_not_matter(order, cut):
    step = tiny_step()
    columns = tokens_of(step), categories_of(step), step.mask, step.prompt_index
    whole, counts = category_sums(*columns, 4, 4)
    pieces = [category_sums(*(c[list(part)] for c in columns), 4, 4) for part in (order[:cut], order[cut:])]
    torch.testing.assert_close(pieces[0][0] + pieces[1][0], whole)
    assert torch.equal(pieces[0][1] + pieces[1][1], counts)


@pytest.mark.parametrize("correction", [None, "token", "sequence"])
@given(data=st.data())
def test_kl_coefficients_are_the_gradient_of_the_term(correction, data):
    """Against autograd by the log-probabilities; the estimator sees only the gradient by the reference."""
    rows, width = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 5))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**16)))
    weights, logps, old, reference = torch.randn(4, rows, width, generator=generator, dtype=torch.float64)
    mask = torch.arange(width) < torch.randint(0, width + 1, (rows, 1), generator=generator)
    if data.draw(st.booleans()):
        reference = logps.clone()  # the first step of a run
    logps.requires_grad_(), reference.requires_grad_()
    term = torch.exp(reference - logps) - (reference - logps) - 1
    ratio = (logps - old).where(mask, 0.0)
    if correction == "token":
        term = term * ratio.exp()
    elif correction == "sequence":
        term = term * (ratio.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)).exp()
    expected, by_reference = torch.autograd.grad((weights * term)[mask].sum(), [logps, reference])
    found = kl_coefficients(by_reference, (reference - logps).detach(), mask, correction)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-13)
