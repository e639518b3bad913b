"""Gram, sketch and parameters' norms of per-row gradients against rows written out by loops, in float64."""

import pytest
import torch

from trl_entropy.estimators.kernel import row_kernels
from trl_entropy.estimators.kernel.row_kernels import Gram, ParameterNorms, SketchedRows, blockwise_gram
from trl_entropy.estimators.kernel.sketch import CountSketch
from trl_entropy.estimators.rows.row_gradients import OuterProducts, WrittenOut
from trl_entropy.estimators.rows.row_sums import Several

SHAPES = {"weight": torch.Size((4, 3)), "bias": torch.Size((4,))}
GENERATOR = torch.Generator().manual_seed(1)
METRIC = {
    "weight": torch.rand(4, 3, generator=GENERATOR).double() + 0.1,
    "bias": torch.tensor([0.5, 0, 2, 1]).double(),
}


def factors(num_rows=6, num_tokens=5):
    generator = torch.Generator().manual_seed(0)
    shapes = (num_rows, num_tokens, 3), (num_rows, num_tokens, 4)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def rows_by_loops():
    inputs, grads = factors()
    rows = []
    for x, g in zip(inputs, grads, strict=True):
        weight = sum(torch.outer(g_t, x_t) for x_t, g_t in zip(x, g, strict=True))
        rows.append(torch.cat([weight.flatten(), g.sum(0)]))
    return torch.stack(rows)


def metric_flat():
    return torch.cat([METRIC[name].flatten() for name in SHAPES])


def hand_out(consumer, batches):
    """Batches of row numbers, as a backward pass hands them out: the last parameter first."""
    inputs, grads = factors()
    consumer.bind(SHAPES, torch.device("cpu"))
    for numbers in map(torch.tensor, batches):
        consumer.begin(numbers)
        consumer.add("bias", WrittenOut(grads[numbers].sum(1)), numbers)
        consumer.add("weight", OuterProducts(inputs[numbers], grads[numbers]), numbers)
    return consumer


@pytest.mark.parametrize(
    ("batches", "tolerance"),
    [([[0, 1, 2, 3, 4, 5]], 1e-12), ([[3, 0, 5, 1, 4, 2]], 1e-12), ([[3, 0, 5], [1], [4, 2]], 1e-6)],
    ids=["one batch", "in another order", "rows kept in float32"],
)
@pytest.mark.parametrize("columns", [2**14, 5])
def test_gram_is_that_of_the_rows_in_the_metric(monkeypatch, batches, tolerance, columns):
    monkeypatch.setattr(row_kernels, "_BLOCK_COLUMNS", columns)
    rows = rows_by_loops()
    expected = (rows * metric_flat()) @ rows.T
    gram = hand_out(Gram(6, METRIC), batches).values
    assert gram.dtype == torch.float64
    assert (gram - expected).abs().max() < tolerance * expected.diagonal().max()


def test_one_batch_keeps_no_gradient_and_leaves_them_to_other_consumers():
    gram, norms = Gram(6, METRIC), ParameterNorms(6, METRIC)
    hand_out(Several(gram, norms), [[2, 0, 1, 3, 5, 4]])
    assert gram._rows is None
    torch.testing.assert_close(norms.values.sum(0), gram.values.diagonal())


def test_norms_by_parameter():
    rows, m = rows_by_loops(), metric_flat()
    norms = hand_out(ParameterNorms(6, METRIC), [[3, 0, 5], [1], [4, 2]]).values
    squares = rows.square() * m
    torch.testing.assert_close(norms, torch.stack([squares[:, :12].sum(1), squares[:, 12:].sum(1)]))


def test_sketched_rows_are_sketches_of_the_rows():
    sketch, rows = CountSketch(7, 1), rows_by_loops()
    expected = sketch.block(rows[:, :12], "weight", METRIC["weight"].flatten())
    expected += sketch.block(rows[:, 12:], "bias", METRIC["bias"])
    torch.testing.assert_close(hand_out(SketchedRows(6, sketch, METRIC), [[3, 0, 5], [1, 4, 2]]).values, expected)


def test_a_batch_after_that_of_all_rows_is_refused():
    with pytest.raises(ValueError, match="came again"):
        hand_out(Gram(6, METRIC), [[0, 1, 2, 3, 4, 5], [0]])


def test_blocks_in_float32_lose_next_to_nothing():
    """2e6 numbers a row, with a common part that makes the entries large: 1e-6 of |x| |y|."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(4, 2_000_000, generator=generator) + 0.5
    exact = rows.double() @ rows.double().T
    norms = exact.diagonal().sqrt()
    assert ((blockwise_gram(rows, rows) - exact).abs() / norms.outer(norms)).max() < 1e-6
