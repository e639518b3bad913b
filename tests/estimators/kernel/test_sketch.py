"""CountSketch: unbiased and of the stated variance, by enumeration of every hash and over many seeds (T13)."""

import hashlib
import itertools

import pytest
import torch
from kernel_oracles import exact_kernel, sketch_stderr

from trl_entropy.estimators.kernel.fisher_kernel import spectrum
from trl_entropy.estimators.kernel.sketch import CountSketch

X = torch.tensor([[1.0, -0.5, 2.0], [0.3, 1.5, 0.7]], dtype=torch.float64)
METRIC = torch.tensor([2.0, 0.5, 1.0], dtype=torch.float64)


class FixedSketch(CountSketch):
    """A sketch whose hashes are given instead of drawn."""

    places: torch.Tensor
    flips: torch.Tensor

    def buckets(self, positions, name):
        return self.places[positions]

    def signs(self, positions, name):
        return self.flips[positions]


def test_every_hash_in_turn():
    """2 rows of R, 3 coordinates: 8 placements x 8 signs, each as likely; exact mean and variance."""
    grams = []
    for places, flips in itertools.product(
        itertools.product(range(2), repeat=3), itertools.product((-1, 1), repeat=3)
    ):
        sketch = FixedSketch(2, 0)
        object.__setattr__(sketch, "places", torch.tensor(places))
        object.__setattr__(sketch, "flips", torch.tensor(flips, dtype=torch.float64))
        rows = sketch.block(X, "block", METRIC)
        grams.append(rows @ rows.T)
    exact = exact_kernel(X, METRIC)
    grams = torch.stack(grams)
    torch.testing.assert_close(grams.mean(0), exact)
    fourth = 2 * (METRIC.square() * X.square()) @ X.square().T
    variance = (grams - exact).square().mean(0)
    torch.testing.assert_close(variance, sketch_stderr(exact, 2).square() - fourth / 2)
    assert (variance < sketch_stderr(exact, 2).square()).all()


def sketched_grams(rows, dim, seeds, metric=None):
    sketches = torch.stack([CountSketch(dim, seed).block(rows, "weight", metric) for seed in seeds])
    return sketches @ sketches.mT


@pytest.mark.parametrize("dim", [1, 2, 5])
def test_seeds_are_such_draws(dim):
    """2000 seeds of the hash that is used: mean within 4.5 of its standard errors, variance within 15 %."""
    exact, grams = exact_kernel(X, METRIC), sketched_grams(X, dim, range(2000), METRIC)
    stderr = grams.std(0) / 2000**0.5
    assert ((grams.mean(0) - exact).abs() < 4.5 * stderr + 1e-12).all()
    fourth = 2 * (METRIC.square() * X.square()) @ X.square().T
    variance = sketch_stderr(exact, dim).square() - fourth / dim
    torch.testing.assert_close(grams.var(0), variance, rtol=0.15, atol=0)


def correlated_rows(num=6, dim=4000):
    generator = torch.Generator().manual_seed(0)
    common = torch.randn(dim, generator=generator, dtype=torch.float64)
    weights = torch.linspace(0, 2, num, dtype=torch.float64)[:, None]
    return torch.randn(num, dim, generator=generator, dtype=torch.float64) + weights * common


@pytest.mark.parametrize("dim", [16, 64, 256, 1024])
def test_error_falls_as_the_formula(dim):
    """Error over 100 seeds, relative to sqrt(K_ii K_jj), against sqrt((1 + cos^2)/dim): ratio 1 within 10 %."""
    rows = correlated_rows()
    exact = exact_kernel(rows)
    error = (sketched_grams(rows, dim, range(100)) - exact).square().mean(0)
    assert float((error / sketch_stderr(exact, dim).square()).mean().sqrt()) == pytest.approx(1, abs=0.1)
    norms = exact.diagonal().sqrt()
    relative = sketch_stderr(exact, dim) / norms.outer(norms)
    cosine = exact / norms.outer(norms)
    torch.testing.assert_close(relative, ((1 + cosine.square()) / dim).sqrt())


def test_blocks_slices_and_order_give_the_same_sketch():
    """A rank with a slice of a block, blocks in any order, float32 rows: the same hashes."""
    sketch, rows = CountSketch(32, 7), correlated_rows(dim=100)
    whole = sketch.block(rows, "a")
    pieces = [sketch.block(rows[:, start : start + 40], "a", offset=start) for start in (80, 0, 40)]
    torch.testing.assert_close(sum(pieces), whole)
    assert torch.equal(sketch.block(rows.float(), "a"), sketch.block(rows.float().double(), "a"))
    assert not torch.equal(sketch.block(rows, "b"), whole)
    assert not torch.equal(CountSketch(32, 8).block(rows, "a"), whole)


def test_hashes_are_pinned():
    """Sketches of different steps and machines meet: by Python integers, what torch computes on any device."""
    sketch = CountSketch(11, 3)
    positions = torch.tensor([0, 1, 2**31 - 2])
    for purpose, got in (("bucket", sketch.buckets(positions, "w")), ("sign", sketch.signs(positions, "w"))):
        digest = hashlib.sha256(f"3/w/{purpose}".encode()).digest()
        a, b, c, d = (int.from_bytes(digest[8 * i : 8 * i + 8], "little") for i in range(4))
        values = [(a * x**3 + b * x**2 + c * x + d) % (2**31 - 1) for x in positions.tolist()]
        assert got.tolist() == [v % 11 if purpose == "bucket" else 2 * (v % 2) - 1 for v in values]


def test_chunks_do_not_matter(monkeypatch):
    rows, metric = correlated_rows(dim=50), torch.rand(50, generator=torch.Generator().manual_seed(1))
    whole = CountSketch(8, 0).block(rows, "a", metric)
    monkeypatch.setattr("trl_entropy.estimators.kernel.sketch._CHUNK", 40)
    torch.testing.assert_close(CountSketch(8, 0).block(rows, "a", metric), whole)


def test_what_is_not_linear_is_biased():
    """The effective rank of a sketch is too small, and right when the sketch is much wider than the rank."""
    rows = torch.randn(40, 5000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    exact = spectrum(exact_kernel(rows)).effective_rank
    sketched = {dim: CountSketch(dim, 0).block(rows, "a") for dim in (20, 4096)}
    ranks = {dim: spectrum(exact_kernel(part)).effective_rank for dim, part in sketched.items()}
    assert ranks[20] <= 20 < 0.6 * exact
    assert ranks[4096] == pytest.approx(exact, rel=0.02)


def test_too_long_a_block_is_refused():
    with pytest.raises(ValueError, match="split it"):
        CountSketch(4, 0).block(torch.zeros(1, 2), "huge", offset=2**31 - 2)
