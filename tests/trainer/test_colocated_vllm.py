"""The port of a run with vLLM inside it; what needs vLLM itself stands in `tests/real_vllm`."""

import os
from types import SimpleNamespace

import pytest
import torch

from trl_entropy.trainer.colocated_vllm import built_for_training

COLOCATED = {"use_vllm": True, "vllm_mode": "colocate"}


@pytest.fixture
def port(monkeypatch):
    """The port after an engine was built, by the variables that a launcher left and the settings."""

    def chosen(variables=(), **settings):
        for name in ("MASTER_PORT", "WORLD_SIZE"):
            monkeypatch.delenv(name, raising=False)
        for name, value in dict(variables).items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: False)
        with built_for_training(SimpleNamespace(**(COLOCATED | settings))):
            return os.environ.pop("MASTER_PORT", None)

    return chosen


def test_runs_of_one_process_have_ports_of_their_own(port):
    ports = {port() for _ in range(3)} | {port({"MASTER_PORT": "0"})}
    assert len(ports) > 1 and "29500" not in ports


def test_a_port_that_a_launcher_gave_is_kept(port):
    assert port({"MASTER_PORT": "1234"}) == "1234"
    assert port({"WORLD_SIZE": "2"}) is None
    assert port(use_vllm=False) is None and port(vllm_mode="server") is None
