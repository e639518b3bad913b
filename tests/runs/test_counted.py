"""One of them has no plural."""

import pytest

from trl_entropy.runs.counted import counted


@pytest.mark.parametrize(
    "number, noun, said",
    [(0, "step", "0 steps"), (1, "step", "1 step"), (2, "step", "2 steps"), (1000000, "step", "1000000 steps"),
     (1, "process", "1 process"), (2, "process", "2 processes"), (2, "micro-batch", "2 micro-batches"),
     (1.0, "epoch", "1 epoch"), (0.5, "epoch", "0.5 epochs")],
)  # fmt: skip
def test_a_number_with_its_noun(number, noun, said):
    assert counted(number, noun) == said
