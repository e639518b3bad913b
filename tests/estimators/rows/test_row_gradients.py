"""Factored gradients against the same written out by loops."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_entropy.estimators.rows import row_gradients
from trl_entropy.estimators.rows.row_gradients import Grouping, Lookups, OuterProducts, Sum, WrittenOut

sizes = st.integers(1, 6)


def outer_by_loops(inputs, grads):
    return torch.stack(
        [sum(torch.outer(g, x) for x, g in zip(*row, strict=True)) for row in zip(inputs, grads, strict=True)]
    )


def table_by_loops(ids, grads, num_embeddings):
    tables = torch.zeros(len(ids), num_embeddings, grads.shape[-1], dtype=grads.dtype)
    for table, row_ids, row_grads in zip(tables, ids, grads, strict=True):
        for token, grad in zip(row_ids, row_grads, strict=True):
            table[token] += grad
    return tables


def check(gradients, expected, generator):
    metric, *vectors = (torch.randn(expected.shape[1:], generator=generator).double() for _ in range(4))
    close = lambda actual, wanted: torch.testing.assert_close(actual, wanted, rtol=1e-12, atol=1e-12)  # noqa: E731
    for norms_metric in (None, metric):
        wanted = (expected.square() * (1 if norms_metric is None else norms_metric)).flatten(1).sum(1)
        close(gradients.squared_norms(norms_metric), wanted)
    for few in (vectors[:1], vectors):
        close(gradients.dots(few), torch.stack([(expected * v).flatten(1).sum(1) for v in few]))
    close(gradients.total(), expected.sum(0))
    close(torch.cat([part for _, part in gradients.chunks()]), expected)
    close(gradients.whole, expected)
    # Once written out, it may be used instead of the factors.
    close(gradients.squared_norms(), expected.square().flatten(1).sum(1))
    close(gradients.dots(vectors[:1]), (expected * vectors[0]).flatten(1).sum(1)[None])


@settings(max_examples=40, deadline=None)
@given(sizes, sizes, sizes, sizes, st.sampled_from([1, 20, 2**24]), st.integers(0, 99))
def test_reductions_equal_loops(num_rows, num_tokens, width, num_lines, chunk_numel, seed):
    generator = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=generator).double()  # noqa: E731
    ids = torch.randint(num_lines, (num_rows, num_tokens), generator=generator)
    inputs, grads = normal(num_rows, num_tokens, width), normal(num_rows, num_tokens, num_lines)
    line_grads = normal(num_rows, num_tokens, width)
    outer, table = outer_by_loops(inputs, grads), table_by_loops(ids, line_grads, num_lines)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(row_gradients, "CHUNK_NUMEL", chunk_numel)
        patch.setattr(row_gradients, "_MANY_TOKENS", 1 + 5 * (seed % 2))
        check(OuterProducts(inputs, grads), outer, generator)
        check(Lookups(ids, line_grads, num_lines), table, generator)
        check(WrittenOut(outer), outer, generator)
        parts = [OuterProducts(inputs, grads), Lookups(ids, line_grads, num_lines)]
        check(Sum(parts), outer + table, generator)


def test_cheaper_way_is_chosen(monkeypatch):
    few_tokens = OuterProducts(torch.randn(2, 3, 40), torch.randn(2, 3, 50))
    monkeypatch.setattr(few_tokens, "dense", lambda rows: pytest.fail("written out, though T (i + o) < i o"))
    few_tokens.squared_norms()
    few_tokens.dots([torch.randn(50, 40)])
    lookups = Lookups(torch.zeros(2, 3, dtype=torch.long), torch.randn(2, 3, 4), 1000)
    monkeypatch.setattr(lookups, "dense", lambda rows: pytest.fail("table written out"))
    lookups.squared_norms(torch.ones(1000, 4))
    lookups.dots([torch.ones(1000, 4)] * 2)
    few_tokens.total(), lookups.total()


def test_float32_sums_over_many_numbers_stay_accurate():
    grads = torch.randn(1, 2, 2**22, generator=torch.Generator().manual_seed(0))
    expected = grads.double().square().sum()
    torch.testing.assert_close(WrittenOut(grads).squared_norms().double().sum(), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(WrittenOut(grads).dots([grads[0]]).double().sum(), expected, rtol=1e-6, atol=0)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(-1, 3), min_size=1, max_size=7).filter(lambda rows: max(rows) >= 0), st.integers(0, 99))
def test_grouping_sums_the_sequences_of_a_row(rows, seed):
    generator = torch.Generator().manual_seed(seed)
    inputs, grads = (torch.randn(len(rows), 2, 3, width, generator=generator).double() for width in (4, 5))
    ids = torch.randint(7, (len(rows), 2, 3), generator=generator)
    grouping = Grouping.of(torch.tensor(rows))
    numbers = grouping.numbers.tolist()
    assert sorted(numbers) == sorted({row for row in rows if row >= 0})

    def summed(by_sequence):
        return torch.stack([sum(by_sequence[b] for b, row in enumerate(rows) if row == n) for n in numbers])

    tokens = inputs.flatten(1, 2), grads.flatten(1, 2)
    actual = OuterProducts(*grouping.by_row(inputs, grads)).whole
    torch.testing.assert_close(actual, summed(outer_by_loops(*tokens)), rtol=1e-12, atol=1e-12)
    actual = Lookups(*grouping.by_row(ids, grads), 7).whole
    torch.testing.assert_close(actual, summed(table_by_loops(ids.flatten(1), tokens[1], 7)), rtol=1e-12, atol=1e-12)


def test_unique_rows_are_not_copied():
    inputs, grads = torch.randn(3, 2, 4), torch.randn(3, 2, 5)
    same = Grouping.of(torch.tensor([5, 0, 2])).by_row(inputs, grads)
    assert [part.data_ptr() for part in same] == [inputs.data_ptr(), grads.data_ptr()]


def test_a_batch_without_rows_is_refused():
    with pytest.raises(ValueError, match="without any row"):
        Grouping.of(torch.tensor([-1, -1]))
