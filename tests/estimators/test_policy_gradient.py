"""Advantages against loops; the surrogate's gradient against that of the clipped loss (T2) at ratio 1."""

import pytest
import torch

from trl_entropy.estimators.policy_gradient import group_advantages, policy_gradient_terms


def test_advantages_are_rewards_minus_their_groups_mean():
    rewards = torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0, 1.0])
    assert group_advantages(rewards, 3).tolist() == pytest.approx([2 / 3, -1 / 3, -1 / 3, 0.0, 0.0, 0.0])
    assert group_advantages(rewards, 2).tolist() == pytest.approx([0.5, -0.5, -0.5, 0.5, 0.0, 0.0])


def test_gradient_is_that_of_the_clipped_loss_where_it_was_sampled():
    generator = torch.Generator().manual_seed(0)
    logps = -torch.rand(4, 3, dtype=torch.float64, generator=generator)
    mask = torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 0], [0, 0, 0]])
    advantages, normalizers = torch.tensor([0.7, -0.4, -0.3, 0.0]), torch.tensor([3, 5, 5, 3])

    def clipped_loss(current):
        total = torch.zeros((), dtype=torch.float64)
        for i in range(4):
            for k in range(3):
                if mask[i, k]:
                    ratio = (current[i, k] - logps[i, k]).exp()
                    gain = torch.min(ratio * advantages[i], ratio.clamp(0.8, 1.2) * advantages[i])
                    total = total - gain / normalizers[i] / 4
        return total

    def surrogate(current):
        return policy_gradient_terms(current, mask, advantages, normalizers).mean()

    expected, got = (torch.func.grad(function)(logps) for function in (clipped_loss, surrogate))
    torch.testing.assert_close(got, expected)
    assert got.abs().max() > 0.01
