"""Turns of an episode: against a loop over the tokens."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from trl_entropy.estimators.attribution.turns import sums_by_category, turn_index

masks = st.integers(1, 9).flatmap(
    lambda width: st.lists(st.lists(st.integers(0, 1), min_size=width, max_size=width), min_size=1, max_size=4)
)


@given(masks, st.integers(0, 3))
def test_a_turn_begins_after_each_run_of_other_tokens(rows, most):
    expected = []
    for row in rows:
        turn, before, found = -1, 0, []
        for own in row:
            turn += own and not before
            found.append(min(max(turn, 0), most) if own else 0)
            before = own
        expected.append(found)
    mask = torch.tensor(rows)
    assert turn_index(mask, most).tolist() == expected
    assert turn_index(mask.bool(), most).tolist() == expected


@given(masks)
def test_sums_and_counts_by_category(rows):
    mask = torch.tensor(rows)
    values = torch.arange(mask.numel(), dtype=torch.float32).view(mask.shape) + 1
    index = turn_index(mask, 2)
    sums = sums_by_category(values, index, mask, 3)
    for number in range(3):
        mine = values[mask.bool() & (index == number)]
        assert sums[:, number].tolist() == [float(mine.sum()), len(mine)]
