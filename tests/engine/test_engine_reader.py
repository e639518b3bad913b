"""What a reader computes from vectors over the parameters."""

import pytest
import torch


def test_the_inner_product_is_summed_in_float64_in_the_order_of_the_first(built):
    engine = built()
    generator = torch.Generator().manual_seed(0)
    a, b = (
        {name: torch.randn(param.shape, generator=generator) for name, param in engine.parameters.items()}
        for _ in range(2)
    )
    expected = 0.0
    for name in a:
        expected += float((a[name].double() * b[name].double()).sum())
    assert engine.dot(a, dict(reversed(b.items()))) == expected
    single = {name: torch.zeros_like(value) for name, value in a.items()}
    single["norm.bias"][0] = 1 / 3  # its square is not a float32
    assert engine.dot(single, single) == single["norm.bias"][0].item() ** 2


def test_the_inner_product_needs_the_same_names(built):
    engine = built()
    with pytest.raises(KeyError, match=r"norm\.bias"):
        engine.dot(engine.theta(), {name: value for name, value in engine.theta().items() if name != "norm.bias"})
