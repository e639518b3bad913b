"""When a floor is let go: a number of steps in a row, and then for good."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trl_entropy.estimators.control.release import Release


@pytest.mark.parametrize(
    "rewards, expected",
    [
        ([0.5, 0.6, 0.7, 0.1], [False, False, True, True]),  # at the level counts; later rewards change nothing
        ([0.5, 0.6, 0.4, 0.6, 0.9, 0.5], [False, False, False, False, False, True]),
        ([0.6, 0.6, math.nan, 0.6], [False] * 4),
    ],
)
def test_it_lets_go_after_steps_in_a_row(rewards, expected):
    release, found = Release(level=0.5, steps=3), []
    for reward in rewards:
        release.add(reward)
        found.append(release.released)
    assert found == expected


@given(st.lists(st.sampled_from([0.0, 1.0]), max_size=30), st.integers(1, 5))
def test_it_lets_go_where_the_rewards_first_hold_for_so_long(rewards, steps):
    release, found = Release(level=0.5, steps=steps), []
    for reward in rewards:
        release.add(reward)
        found.append(release.released)
    for number in range(len(rewards)):
        windows = (rewards[end - steps : end] for end in range(steps, number + 2))
        assert found[number] == any(min(window) >= 0.5 for window in windows)
