"""(T17): the change by a step's own gradient has the sign, the step length and the metric of an update."""

import itertools

import pytest
import torch
from tiny_groups import TinyGroups, batches, loss_sums
from tiny_policy import TinyPolicy

from trl_entropy.estimators.entropy_change.cross_prompt import (
    accepted_gram,
    cross_prompt_change,
    relative_gradient_error,
)
from trl_entropy.estimators.entropy_change.surrogate import surrogate_terms
from trl_entropy.estimators.optimizer.adamw import AdamWSettings, adamw_moments, adamw_update_parts
from trl_entropy.estimators.optimizer.rules import AdamWRule

SETTINGS = AdamWSettings(0.05, (0.9, 0.98), 1e-3, 0.1)


def update_metric(exp_avg_sq, settings, step, clip_factor):
    """As `engine.optimizer_step.metric_before` puts it together, of one parameter."""
    rule, group = AdamWRule(), vars(settings)
    metric = rule.metric({"exp_avg_sq": exp_avg_sq}, exp_avg_sq, step - 1, group)
    return rule.coefficient(step, group, clip_factor) * metric


def rows(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 5, 3, generator=generator, dtype=torch.float64)


def test_the_metric_is_that_before_the_step_at_the_length_of_this_step():
    """Two steps of AdamW: what the second multiplies its gradient by, but with the second moment after the first."""
    first, second = rows()[0, :2]
    nothing = torch.zeros(3, dtype=torch.float64)
    _, exp_avg_sq = adamw_moments(first, nothing, nothing, SETTINGS.betas)
    metric = update_metric(exp_avg_sq, SETTINGS, 2, clip_factor=0.7)
    length = 0.05 * 0.7 * 0.1 / (1 - 0.9**2)
    torch.testing.assert_close(metric, length / (first.abs() + 1e-3))  # v_hat after one step is the square itself
    # A second gradient of the same size leaves v_hat as it is, and then M of before is M of after.
    parts = adamw_update_parts(nothing, first, nothing, exp_avg_sq, 2, SETTINGS, 1.0)
    torch.testing.assert_close(parts.gradient, -update_metric(exp_avg_sq, SETTINGS, 2, 1.0) * first)
    parts = adamw_update_parts(nothing, 9 * second, nothing, exp_avg_sq, 2, SETTINGS, 1.0)
    assert not torch.allclose(parts.gradient, -update_metric(exp_avg_sq, SETTINGS, 2, 1.0) * 9 * second)


def test_where_no_gradient_was_the_metric_is_0():
    metric = update_metric(torch.tensor([0.0, 0.5]), SETTINGS, 2, clip_factor=1.0)
    assert metric[0] == 0 and metric[1] > 0
    assert update_metric(torch.zeros(2), SETTINGS, 1, clip_factor=1.0).tolist() == [0, 0]  # not 1/eps, nor nan


def test_it_is_the_change_by_a_step_against_the_gradient_over_pairs_of_prompts():
    x, y = rows()
    change = cross_prompt_change(x @ y.T)
    pairs = [float(x[n] @ y[m]) for n, m in itertools.permutations(range(5), 2)]
    assert change.cross_prompt.value == pytest.approx(-sum(pairs) / 20)
    assert change.same_sample == pytest.approx(-float(x.mean(0) @ y.mean(0)))
    assert (change.cross_prompt.dof, change.cross_prompt.num_samples) == (4, 5) and change.cross_prompt.stderr > 0


def test_a_number_of_tokens_may_be_taken_as_given():
    """
    The mean of U over all batches, with a loss divided by the batch's tokens and the exact h and mean length, against
    grad h . E[g]: off by O(1/P).
    """
    policy = TinyPolicy(max_length=2, num_prompts=1)
    groups, mask = TinyGroups(policy), policy.completion_mask
    sums, tokens = loss_sums(policy, groups)
    h, length = (float(value(policy.theta)) for value in (policy.policy_entropy, policy.mean_length))

    def rows_of_entropy(theta):
        return surrogate_terms(*policy.score(theta), mask, h) / length

    x = torch.autograd.functional.jacobian(rows_of_entropy, policy.theta)[groups.rows].mean(1)
    gradient = policy.policy_entropy_gradient(policy.theta)
    torch.testing.assert_close(groups.probability @ x, gradient)
    for num_prompts, share in ((2, 0.9957), (4, 0.9982)):
        rows, p = batches(groups.probability, num_prompts)
        y = sums[rows] / tokens[rows].mean(1)[:, None, None]
        gram = torch.einsum("bnd,bmd->bnm", x[rows], y)
        u = (gram.sum((1, 2)) - gram.diagonal(dim1=1, dim2=2).sum(1)) / (num_prompts * (num_prompts - 1))
        assert float(p @ u) == pytest.approx(share * float(gradient @ (p @ y.mean(1))), rel=1e-3)


def test_accepted_groups_alone_make_the_gradient():
    x, y = rows()
    accepted = torch.tensor([True, False, True, True, False])
    y[~accepted] = 0  # no gradient, and sum_n y_n / P is that of the step
    share = accepted_gram(x @ y.T, accepted)
    torch.testing.assert_close(share, x[accepted] @ (y[accepted] * 3 / 5).T)
    torch.testing.assert_close((y[accepted] * 3 / 5).mean(0), y.mean(0))


def test_the_error_is_relative_to_the_gradient_of_the_optimizer():
    gradient = torch.tensor([3.0, 4.0])
    assert float(relative_gradient_error(4 * gradient, 4, gradient)) == 0
    assert float(relative_gradient_error(4 * (gradient + torch.tensor([0.0, 1.0])), 4, gradient)) == pytest.approx(0.2)
