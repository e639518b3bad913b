"""What vLLM and TRL do, on which the package relies or which it mends: a failure says what to look at."""

import configparser
import inspect
import re
import sys
import warnings
from types import SimpleNamespace

import pytest
import torch
from packaging.version import Version
from vllm_runs import NEEDS_VLLM, REPOSITORY

from trl_entropy.trainer.colocated_vllm import built_for_training

pytestmark = NEEDS_VLLM


def layer() -> torch.nn.Module:
    module = torch.nn.Linear(32, 64, bias=False)
    return module.requires_grad_(False)


@pytest.mark.parametrize("remove_weight", [True, False])
def test_weights_are_packed_once_so_that_a_step_cannot_load_its_own(remove_weight):
    """Once this fails, `weights_that_can_be_loaded` can go: vLLM then computes with what TRL loads after a step."""
    from vllm.model_executor.layers import utils

    module = layer()
    utils.dispatch_cpu_unquantized_gemm(module, remove_weight=remove_weight)
    assert (module.weight.numel() == 0) == remove_weight
    if not remove_weight:
        x, before = torch.randn(3, 32), module.weight.clone()
        module.weight.zero_()
        stale = module.cpu_linear(x, module.weight, None)
        assert torch.allclose(stale, x @ before.T, atol=1e-4), "the packed copy is used, not what was loaded"


def test_inside_the_seam_what_is_loaded_is_what_computes():
    from vllm.model_executor.layers import utils

    packed, args = utils.dispatch_cpu_unquantized_gemm, SimpleNamespace(use_vllm=True, vllm_mode="colocate")
    module, x = layer(), torch.randn(3, 32)
    with built_for_training(args):
        utils.dispatch_cpu_unquantized_gemm(module, remove_weight=True)
    module.weight.fill_(2.0)
    assert torch.equal(module.cpu_linear(x, module.weight, None), x @ module.weight.T)
    assert utils.dispatch_cpu_unquantized_gemm is packed
    with built_for_training(SimpleNamespace(use_vllm=True, vllm_mode="server")):
        assert utils.dispatch_cpu_unquantized_gemm is packed


def test_trl_takes_one_port_for_all_runs():
    """Once this fails, `choose_port` can go."""
    from trl.trainer import utils

    assert "candidates = (29500, " in inspect.getsource(utils._find_free_port)
    assert "_find_free_port()" in inspect.getsource(utils.ensure_master_addr_port)


@pytest.mark.parametrize("place", ["linear", "vocab_parallel_embedding"])
def test_layers_look_the_packing_up_in_its_module(place):
    module = __import__(f"vllm.model_executor.layers.{place}", fromlist=["x"])
    assert "    from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm" in inspect.getsource(
        module
    )
    assert not hasattr(module, "dispatch_cpu_unquantized_gemm"), "the seam replaces it in layers/utils.py alone"


def test_trl_refuses_a_server_on_a_cpu():
    """It sends weights with NCCL alone; docs/use/vllm.md says so."""
    from trl.generation.vllm_client import VLLMClient

    client = object.__new__(VLLMClient)
    client.base_url, client.group_port = "http://127.0.0.1:1", 1
    client.get_server_info = lambda: {"weight_transfer_config": {"backend": "nccl"}}
    client.get_world_size = lambda: 1
    with pytest.raises(NotImplementedError, match="needs a CUDA device, got 'cpu'"):
        client.init_communicator(device="cpu")


def test_the_extra_asks_for_versions_that_trl_supports():
    settings = configparser.ConfigParser()
    settings.read(REPOSITORY / "setup.cfg")
    low, high = re.search(r"^vllm>=([\d.]+),<([\d.]+)$", settings["options.extras_require"]["vllm"], re.M).groups()
    import vllm
    from trl.import_utils import is_vllm_available

    assert Version(low) <= Version(Version(vllm.__version__).base_version) < Version(high)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert is_vllm_available()
    source = inspect.getsource(sys.modules["trl.import_utils"].is_vllm_available)
    first, last = re.search(r'Version\("([\d.]+)"\) <= _vllm_base_version <= Version\("([\d.]+)"\)', source).groups()
    assert Version(first) <= Version(low) and Version(high) <= Version(last)
