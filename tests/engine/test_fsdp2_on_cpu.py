"""What accelerate does not say where FSDP2 is asked for: it trains with DDP on a CPU, and makes float32 of bf16."""

import inspect
import logging
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, fsdp_utils

from trl_entropy.engine.build import upcasts_when_sharding
from trl_entropy.engine.fsdp2_on_cpu import warn_if_unsharded


@pytest.mark.parametrize(
    ("asked", "version", "kind", "warns"),
    [
        ("true", "2", DistributedType.MULTI_CPU, True),
        ("true", "2", DistributedType.FSDP, False),
        ("true", "1", DistributedType.MULTI_CPU, False),
        ("", "2", DistributedType.MULTI_CPU, False),
    ],
)
def test_ddp_in_place_of_fsdp2_is_said_once_on_the_main_process(monkeypatch, caplog, asked, version, kind, warns):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", asked)
    monkeypatch.setenv("FSDP_VERSION", version)
    with caplog.at_level(logging.WARNING):
        for rank in range(2):
            warn_if_unsharded(Mock(spec=Accelerator, distributed_type=kind, is_main_process=rank == 0))
    assert len(caplog.records) == warns
    assert all("shard_on_cpu_if_asked() before" in record.message for record in caplog.records)


@pytest.mark.parametrize(
    ("kind", "version", "mixed", "upcasts"),
    [
        (DistributedType.FSDP, 2, True, True),
        (DistributedType.FSDP, 2, False, False),
        (DistributedType.FSDP, 1, True, False),
        (DistributedType.MULTI_CPU, 2, True, False),
        (None, 2, True, False),
    ],
)
def test_fsdp2_upcasts_with_mixed_precision_alone(monkeypatch, kind, version, mixed, upcasts):
    plugin = SimpleNamespace(fsdp_version=version)
    shared = {} if kind is None else {"distributed_type": kind, "fsdp_plugin": plugin}
    monkeypatch.setattr(AcceleratorState, "_shared_state", shared)
    assert upcasts_when_sharding(mixed) is upcasts


def test_accelerate_upcasts_where_it_is_thought_to():
    text = inspect.getsource(fsdp_utils.fsdp2_prepare_model)
    start = text.index('if accelerator.mixed_precision != "no" and not model_has_params4bit:')
    assert "param.data = param.data.to(torch.float32)" in text[start : start + 500]
