"""The switch of TF32: on inside its context alone, the same by every way in which torch asks for it."""

import pytest
import torch

from trl_entropy.engine import tf32
from trl_entropy.engine.strict_float32 import fp32_strict


def state() -> tuple:
    knobs = [(backend, op) for backend in ("cuda", "mkldnn") for op in ("all", "matmul", "conv", "rnn")]
    own = [torch._C._get_fp32_precision_getter(*knob) for knob in knobs]
    # Both raise where the legacy switch and the new one differ, as a product on the GPU would.
    return own, torch.backends.cuda.matmul.allow_tf32, torch.get_float32_matmul_precision()


@pytest.mark.parametrize("fails", [False, True])
def test_on_inside_alone_and_put_back(fails):
    before = state()
    with fp32_strict():
        strict = state()
        try:
            with tf32.products():
                own, allowed, precision = state()
                assert allowed and precision == "high"
                assert own == ["ieee", "tf32", *["ieee"] * 6]  # only products of matrices on the GPU
                torch.ones(2, 2) @ torch.ones(2, 2)
                if fails:
                    raise KeyError
        except KeyError:
            assert fails
        assert state() == strict
    assert state() == before


def test_a_cpu_has_none():
    assert not tf32.is_available(torch.device("cpu"))


@pytest.mark.parametrize(("capability", "expected"), [((8, 0), True), ((7, 5), False)])
def test_from_which_gpu_on(monkeypatch, capability, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert tf32.is_available(torch.device("cuda")) is expected
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert not tf32.is_available(torch.device("cuda"))
