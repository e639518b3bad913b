"""Ways of training that no engine reads are refused, with the name of what was found and the setting that works."""

import types
from unittest.mock import Mock

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from engine_toy import Tied
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy

from trl_entropy.engine import build, build_engine, trainable_parameters


def test_refuses_parameters_that_no_step_changes(accelerate_to, model: Tied) -> None:
    accelerator = accelerate_to()
    prepared = accelerator.prepare(model, torch.optim.AdamW([model.norm.weight]))
    with pytest.raises(ValueError, match=r"2 trainable parameters are in no parameter group.*'embedding.weight'"):
        build_engine(accelerator, *prepared, max_grad_norm=1.0)


def test_refuses_float16_parameters(accelerate_to, model: Tied) -> None:
    accelerator = accelerate_to()
    optimizer = torch.optim.AdamW(trainable_parameters(model.half()).values())
    with pytest.raises(ValueError, match="float16 parameters; load it with"):
        build_engine(accelerator, *accelerator.prepare(model, optimizer), max_grad_norm=1.0)


def fake_accelerator(**changes) -> Accelerator:
    """An `Accelerator` whose answers are given, without what they would need to be true."""
    answers = {
        "distributed_type": DistributedType.NO,
        "mixed_precision": "no",
        "has_lomo_optimizer": False,
        "parallelism_config": None,
        "num_processes": 1,
    }
    fake = type("FakeAccelerator", (Accelerator,), {**answers, **changes})
    return fake.__new__(fake)


def fsdp_state(**changes) -> types.SimpleNamespace:
    """accelerate's state with FSDP's plugin as launch/fsdp2.yaml has it."""
    plugin = {"fsdp_version": 2, "cpu_offload": OffloadPolicy(), "activation_checkpointing": False}
    return types.SimpleNamespace(fsdp_plugin=types.SimpleNamespace(**(plugin | changes)))


def fake_deepspeed(**changes) -> types.SimpleNamespace:
    """A DeepSpeed engine as ZeRO-2 in bf16 would answer."""
    answers = {
        "zero_optimization_stage": 2,
        "zero_offload_optimizer": None,
        "zero_offload_param": None,
        "fp16_enabled": False,
        "torch_autocast_enabled": False,
        "autotp_size": 0,
        "zero_round_robin_gradients": False,
        "zero_hpz_partition_size": 1,
        "zero_quantized_weights": False,
        "zero_quantized_nontrainable_weights": False,
        "is_deepcompile_enabled": False,
    }
    attributes = {
        "sequence_parallel_size": 1,
        "has_moe_layers": False,
        "pipeline_parallelism": False,
        "basic_optimizer": torch.optim.AdamW([torch.ones(1)]),
        "optimizer": type("DeepSpeedZeroOptimizer", (), {})(),
        "module": nn.Linear(1, 1),
    }
    methods = {name: Mock(return_value=changes.get(name, value)) for name, value in answers.items()}
    return types.SimpleNamespace(**methods, **{name: changes.get(name, value) for name, value in attributes.items()})


QUANTISED = nn.Parameter(torch.ones(1, dtype=torch.uint8), requires_grad=False)


def offload(device: str) -> types.SimpleNamespace:
    return types.SimpleNamespace(device=device)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"zero_optimization_stage": 0}, NotImplementedError, "stage 0 is not supported; set zero_stage: 2"),
        ({"zero_offload_optimizer": offload("cpu")}, NotImplementedError, "offload_optimizer_device: none"),
        ({"zero_offload_param": offload("cpu")}, NotImplementedError, "offload_param_device: none"),
        ({"zero_hpz_partition_size": 2}, NotImplementedError, "zero_hpz_partition_size above 1 is not supported"),
        ({"zero_quantized_weights": True}, NotImplementedError, "zero_quantized_weights is not supported"),
        (
            {"zero_quantized_nontrainable_weights": True},
            NotImplementedError,
            "zero_quantized_nontrainable_weights is not supported",
        ),
        ({"is_deepcompile_enabled": True}, NotImplementedError, "deepcompile is not supported"),
        (
            {"zero_optimization_stage": 3, "module": nn.ParameterDict({"w": QUANTISED})},
            NotImplementedError,
            "quantised 'w'; load bfloat16, or set zero_stage: 2",
        ),
        ({"fp16_enabled": True}, ValueError, "use bf16=True or float32"),
        ({"torch_autocast_enabled": True}, NotImplementedError, "torch_autocast is not supported; turn it off"),
        ({"zero_round_robin_gradients": True}, NotImplementedError, "round_robin_gradients is not supported"),
        ({"autotp_size": 2}, NotImplementedError, "tensor_parallel"),
        ({"has_moe_layers": True}, NotImplementedError, "mixture-of-experts"),
        ({"pipeline_parallelism": True}, NotImplementedError, "pipeline parallelism"),
        ({"sequence_parallel_size": 2}, NotImplementedError, "sequence parallelism"),
        ({"basic_optimizer": type("MuonWithAuxAdam", (), {})()}, NotImplementedError, "Muon"),
        (
            {"optimizer": type("ZenFlowZeroOptimizer", (), {})()},
            NotImplementedError,
            "ZenFlowZeroOptimizer.*no zenflow",
        ),
    ],
)
def test_refuses_deepspeed_settings_by_name(model: Tied, changes: dict, error: type, message: str) -> None:
    wrapped = types.SimpleNamespace(engine=fake_deepspeed(**changes))
    accelerator = fake_accelerator(distributed_type=DistributedType.DEEPSPEED, deepspeed_engine_wrapped=wrapped)
    with pytest.raises(error, match=message):
        build_engine(accelerator, model, None, max_grad_norm=1.0)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"distributed_type": DistributedType.FSDP, "state": fsdp_state(fsdp_version=1)},
            NotImplementedError,
            "version 1 is not supported; set fsdp_version: 2",
        ),
        (
            {"distributed_type": DistributedType.FSDP, "state": fsdp_state(cpu_offload=CPUOffloadPolicy())},
            NotImplementedError,
            "offloaded; set fsdp_offload_params: false",
        ),
        (
            {"distributed_type": DistributedType.FSDP, "state": fsdp_state(activation_checkpointing=True)},
            NotImplementedError,
            "set it to false, and gradient_checkpointing: true",
        ),
        (
            {"distributed_type": DistributedType.FSDP, "state": fsdp_state()},
            NotImplementedError,
            "is not sharded by FSDP2",
        ),
        ({"distributed_type": DistributedType.MEGATRON_LM}, NotImplementedError, "MEGATRON_LM is not supported"),
        ({"distributed_type": DistributedType.XLA}, NotImplementedError, "XLA is not supported"),
        ({"mixed_precision": "fp16"}, ValueError, "'fp16': loss scaling .* use bf16=True"),
        ({"mixed_precision": "fp8"}, ValueError, "'fp8'"),
        ({"has_lomo_optimizer": True}, NotImplementedError, "steps during backward.*use adamw_torch"),
        (
            {"num_processes": 2, "distributed_type": DistributedType.MULTI_CPU},
            ValueError,
            "MULTI_CPU.*averages no",
        ),
        (
            {"parallelism_config": types.SimpleNamespace(tp_size=2, cp_size=1, sp_size=1)},
            NotImplementedError,
            "tp_size is above 1",
        ),
    ],
)
def test_refuses_other_training_by_name(model: Tied, changes: dict, error: type, message: str) -> None:
    optimizer = torch.optim.AdamW(trainable_parameters(model).values())
    with pytest.raises(error, match=message):
        build_engine(fake_accelerator(**changes), model, optimizer, max_grad_norm=1.0)


def test_refuses_sharded_parameters(model: Tied, monkeypatch) -> None:
    """`fully_shard`, should it come without accelerate's knowing, leaves DTensors in the model."""

    class Sharded(nn.Parameter):
        pass

    monkeypatch.setattr(build, "DTensor", Sharded)
    model.norm.bias = Sharded(model.norm.bias.data)
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(NotImplementedError, match=r"sharded parameters \(DTensor\); use one process, DDP"):
        build_engine(fake_accelerator(), model, optimizer, max_grad_norm=1.0)


def test_refuses_data_parallel(model: Tied) -> None:
    optimizer = torch.optim.AdamW(trainable_parameters(model).values())
    with pytest.raises(ValueError, match=r"DataParallel.*accelerate launch"):
        build_engine(fake_accelerator(), nn.DataParallel(model), optimizer, max_grad_norm=1.0)
