"""Lengths by group."""

import torch

from trl_entropy.rollouts.groups import group_max_lengths


def test_the_longest_of_each_group_and_at_least_one():
    """Where every completion of a group is masked as truncated, 1 / length would make the loss nan."""
    lengths = torch.tensor([3, 5, 0, 0, 2, 0])
    assert group_max_lengths(lengths, 2).tolist() == [5, 5, 1, 1, 2, 2]
    assert torch.isfinite(12 / group_max_lengths(lengths, 2)).all()
