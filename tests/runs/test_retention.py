"""Which steps keep their files: bounded, evenly spaced, and the same for a resumed run as for an uninterrupted one."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trl_entropy.runs.retention import retained


def run(kept, steps, keep):
    """The steps that have files after each of `steps` has written its own."""
    for step in steps:
        kept = retained([*kept, step], keep)
        assert len(kept) <= keep and kept[-1] == step
    return kept


@pytest.mark.parametrize(("steps", "keep", "expected"), [
    (range(1, 11), None, list(range(1, 11))),
    (range(1, 11), 0, []),
    (range(1, 11), 1, [10]),
    (range(1, 11), 2, [1, 10]),
    (range(1, 11), 10, list(range(1, 11))),
    (range(1, 12), 10, [1, 3, 5, 7, 9, 11]),
    (range(1, 13), 10, [1, 3, 5, 7, 9, 11, 12]),
    (range(5, 101, 5), 8, [5, 25, 45, 65, 85, 100]),
    ([3], 4, [3]), ([], 4, []), ([], 0, []), ([], 1, []),
    ([1000, 2000, 2001], 100, [1000, 2000, 2001]),  # so few are kept, however uneven
])  # fmt: skip
def test_by_hand(steps, keep, expected):
    assert retained(steps, keep) == expected
    assert retained(reversed(steps), keep) == expected  # whatever the order in which a folder lists them


@given(every=st.integers(1, 9), first=st.integers(0, 9), number=st.integers(1, 90), keep=st.integers(2, 20))
def test_evenly_spaced_with_the_first_and_the_newest_and_not_fewer_than_half(every, first, number, keep):
    steps = range(first, first + every * number, every)
    kept = run([], steps, keep)
    assert kept == retained(steps, keep)  # no history in it
    assert kept[0] == first and kept[-1] == steps[-1]
    assert len({b - a for a, b in itertools.pairwise(kept[:-1])}) <= 1
    assert len(kept) >= min(number, keep // 2)


@given(
    every=st.integers(1, 4), number=st.integers(1, 80), keep=st.integers(1, 12), killed=st.integers(1, 80),
    checkpoint=st.integers(0, 80),
)  # fmt: skip
def test_resumed_is_uninterrupted_once_it_is_past_where_it_was_killed(every, number, keep, killed, checkpoint):
    killed, checkpoint = min(killed, number), min(checkpoint, killed, number)
    steps = [every * place for place in range(1, number + 1)]
    left = [step for step in run([], steps[:killed], keep) if step <= every * checkpoint]  # the others are set aside
    assert run(left, steps[checkpoint:], keep) == run([], steps, keep)


@given(steps=st.lists(st.integers(0, 300), max_size=60), keep=st.integers(0, 30))
def test_any_steps_are_bounded_and_the_newest_stays(steps, keep):
    kept = retained(steps, keep)
    assert len(kept) <= keep and set(kept) <= set(steps) and kept == sorted(kept)
    assert not steps or not keep or kept[-1] == max(steps)
