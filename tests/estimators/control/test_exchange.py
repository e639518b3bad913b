"""(T20): the changes of entropy and reward against enumeration, their errors against many draws, their ratio."""

import pytest
import torch
from entropy_oracles import tangent_terms_from_dot_products
from tiny_groups import TinyGroups, rewards_of
from tiny_policy import TinyPolicy, loglog_slope

from trl_entropy.estimators.control.exchange import (
    ExchangeRecord,
    leave_one_out_advantages,
    mean_over_redraws,
    ratio_over_blocks,
    reward_change_terms,
)
from trl_entropy.estimators.entropy_change.delta_entropy import (
    RatioTerms,
    delta_linear,
)
from trl_entropy.estimators.entropy_change.surrogate import surrogate_terms


@pytest.fixture(scope="module")
def groups():
    return TinyGroups(TinyPolicy(), size=3)


def expected_reward(policy, theta):
    return policy.probabilities(theta) @ rewards_of(policy)


def slope(function, policy, size=1e-5):
    return float(function(policy.theta + size * policy.update) - function(policy.theta - size * policy.update)) / (
        2 * size
    )


def test_the_advantages_leave_each_completion_out():
    rewards = torch.randn(3, 4, dtype=torch.float64)
    for p in range(3):
        for i in range(4):
            others = [float(rewards[p, j]) for j in range(4) if j != i]
            expected = float(rewards[p, i]) - sum(others) / 3
            assert float(leave_one_out_advantages(rewards)[p, i]) == pytest.approx(expected)


def test_first_order_of_the_reward_is_the_slope_of_the_exact_one(groups):
    """All groups of three completions, each a block that counts by its probability."""
    policy = TinyPolicy()
    products = leave_one_out_advantages(groups.rewards) * (groups.scores @ policy.update)
    numerators = (groups.probability * products.sum(1))[:, None]
    found = ratio_over_blocks(numerators, 3 * groups.probability[:, None]).values
    exact = slope(lambda theta: expected_reward(policy, theta), policy)
    assert float(found) == pytest.approx(exact, rel=1e-7) and abs(exact) > 1e-3


def test_first_order_of_the_entropy_is_the_slope_of_the_exact_one():
    """All outcomes, each a block that counts by its probability; h is the exact one, as that of all blocks is."""
    policy = TinyPolicy()
    h, p = policy.policy_entropy(policy.theta), policy.probabilities(policy.theta)

    def terms(theta):
        return surrogate_terms(*policy.score(theta), policy.completion_mask, float(h))

    products = torch.autograd.functional.jacobian(terms, policy.theta) @ policy.update
    found = ratio_over_blocks((p * products)[:, None], (p * policy.num_tokens)[:, None]).values
    assert float(found) == pytest.approx(slope(policy.policy_entropy, policy), rel=1e-7)


def test_the_true_change_of_the_reward_is_unbiased_and_starts_as_first_order_says(groups):
    policy, errors, scales = TinyPolicy(), [], (0.25, 0.125, 0.0625, 0.03125)
    start, mask = policy.score(policy.theta)[1], policy.completion_mask
    advantages = leave_one_out_advantages(groups.rewards)
    first = slope(lambda theta: expected_reward(policy, theta), policy)
    rows = groups.rows[:, 0]  # without a step nothing changes, in any sample
    assert not reward_change_terms(start[rows], start[rows], advantages[:, 0], mask[rows]).any()
    for scale in (4.0, *scales):
        theta = policy.theta + scale * policy.update
        moved = policy.score(theta)[1]
        terms = torch.stack([
            reward_change_terms(moved[rows], start[rows], advantages[:, i], mask[rows])
            for i, rows in enumerate(groups.rows.unbind(1))
        ], dim=1)  # fmt: skip
        found = float(groups.probability @ terms.mean(1))
        exact = float(expected_reward(policy, theta) - expected_reward(policy, policy.theta))
        assert found == pytest.approx(exact, rel=1e-10)
        errors.append(found - scale * first)
    assert loglog_slope(scales, errors[1:]) == pytest.approx(2, abs=0.2)


def test_blocks_are_to_a_ratio_what_completions_are_to_the_first_order():
    generator = torch.Generator().manual_seed(0)
    products, entropy, tokens = torch.rand(3, 12, generator=generator, dtype=torch.float64)
    terms = RatioTerms(entropy, tokens)
    expected = delta_linear(terms, tangent_terms_from_dot_products(products, terms))
    found = ratio_over_blocks(products[:, None], tokens[:, None])
    assert float(found.values) == pytest.approx(float(expected.value))
    torch.testing.assert_close(found.influence[:, 0], expected.influence)


@pytest.mark.parametrize("num_corrected", [0, 4])
def test_the_covariance_is_that_of_many_repetitions(num_corrected):
    """Redraws, blocks and corrections at random; two changes that hang together."""
    generator = torch.Generator().manual_seed(1)
    mix = torch.tensor([[1.0, 0.6], [0.0, 0.8]], dtype=torch.float64)
    values, covariances = [], []
    for _ in range(3000):
        redraws, extra = (torch.randn(10, 2, generator=generator, dtype=torch.float64) @ mix for _ in range(2))
        blocks = torch.randn(16, 2, generator=generator, dtype=torch.float64) @ mix
        corrections = (0.1 * redraws + 0.3 * extra)[:num_corrected] if num_corrected else None
        made = mean_over_redraws(redraws + blocks.mean(0), blocks - blocks.mean(0), corrections)
        values.append(made.values)
        covariances.append(made.covariance)
        assert made.num_prompts == (num_corrected or 10)
    true = torch.stack(values).T.cov()
    torch.testing.assert_close(torch.stack(covariances).mean(0), true, rtol=0.07, atol=0.01)


def record(num_redraws=20):
    """Two methods whose steps are those of none, shortened, and one of its own; entropy first, then reward."""
    generator = torch.Generator().manual_seed(2)
    h, j, other = torch.randn(3, num_redraws, generator=generator, dtype=torch.float64) * 0.1
    h, j = h - 1.0, j + 3.0
    columns = torch.stack([h, h / 2, h + other + 0.4, j, j / 2, j - 0.8], dim=1)
    zero = torch.zeros(8, 6, dtype=torch.float64)
    return ExchangeRecord.of(("none", "half", "other"), mean_over_redraws(columns, zero)), columns


def test_a_shorter_step_exchanges_as_the_step_does():
    found, columns = record()
    assert found.change("entropy", "half").value == pytest.approx(found.change("entropy", "none").value / 2)
    assert found.difference("reward", "half").value == pytest.approx(-found.change("reward", "none").value / 2)
    assert found.exchange("half") == pytest.approx(found.reward_per_entropy("none"))
    assert found.exchange("half")["value"] == pytest.approx(float(columns[:, 3].mean() / columns[:, 0].mean()))


def test_differences_are_paired_and_their_ratio_has_fiellers_interval():
    found, columns = record()
    difference = columns[:, 2] - columns[:, 0]
    stderr = float(difference.std()) / 20**0.5
    estimate = found.difference("entropy", "other")
    assert (estimate.value, estimate.stderr) == pytest.approx((float(difference.mean()), stderr))
    exchange = found.exchange("other")
    assert exchange["value"] == pytest.approx(-0.8 / float(difference.mean()))
    # The reward's difference is known: the ratio's ends are those of the entropy's interval.
    assert exchange["low"] == pytest.approx(-0.8 / estimate.interval()[0])
    assert exchange["high"] == pytest.approx(-0.8 / estimate.interval()[1])
