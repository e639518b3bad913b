"""`build_engine`: picks the engine, and refuses by name each way of training that no engine reads correctly."""

from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy
from torch.distributed.tensor import DTensor, Shard
from torch.nn.parallel import DistributedDataParallel

from trl_entropy.engine.base import Engine
from trl_entropy.engine.deepspeed import DeepSpeedEngine, ZeroEngine
from trl_entropy.engine.fsdp2 import Fsdp2Engine, reshard
from trl_entropy.engine.fsdp2_on_cpu import warn_if_unsharded
from trl_entropy.engine.plain import PlainEngine
from trl_entropy.engine.reader import torch_optimizer

_WORKS = (
    "use one process, DDP (distributed_type: MULTI_GPU), DeepSpeed with zero_stage: 2, or FSDP with fsdp_version: 2"
)
_ZERO_OPTIMIZERS = ("DeepSpeedZeroOptimizer", "BF16_Optimizer", "DeepSpeedZeroOptimizer_Stage3")


def build_engine(accelerator: Accelerator, model: nn.Module, optimizer: object, max_grad_norm: float | None) -> Engine:
    """The engine for the training that `accelerator` was prepared for.

    Args:
        accelerator: after `prepare`.
        model: what `prepare` returned for the model (transformers' `trainer.model_wrapped`).
        optimizer: what `prepare` returned for the optimizer.
        max_grad_norm: of the training arguments; `None` or 0 is no clipping. Under DeepSpeed its own
            `gradient_clipping` counts (transformers sets it from the arguments, and refuses a config that differs).

    Raises:
        NotImplementedError: for FSDP of version 1, Megatron-LM, XLA, ZeRO-0, offload, and other ways of training that
            no engine reads; says which setting works.
        ValueError: for settings that would make gradient or update wrong: float16 loss scaling, `DataParallel`.
    """
    _refuse_common(accelerator, model, optimizer)
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        deepspeed = accelerator.deepspeed_engine_wrapped.engine
        _refuse_deepspeed(deepspeed)
        return _zero_engine(int(deepspeed.zero_optimization_stage()))(accelerator, model)
    if accelerator.distributed_type == DistributedType.FSDP:
        _refuse_fsdp(accelerator)
        return sharded_engine(accelerator, model, torch_optimizer(optimizer), max_grad_norm or 0.0)
    _refuse_plain(accelerator, model)
    warn_if_unsharded(accelerator)
    return PlainEngine(accelerator, model, torch_optimizer(optimizer), max_grad_norm or 0.0)


def _zero_engine(stage: int) -> type[DeepSpeedEngine]:
    if stage < 3:
        return ZeroEngine
    from trl_entropy.engine.zero3 import Zero3Engine  # imports deepspeed, which is there only if it trains

    return Zero3Engine


def _refuse_common(accelerator: Accelerator, model: nn.Module, optimizer: object) -> None:
    kind = accelerator.distributed_type
    if kind in (DistributedType.MEGATRON_LM, DistributedType.XLA):
        raise NotImplementedError(f"training with {kind.value} is not supported; {_WORKS}")
    if accelerator.mixed_precision not in ("no", "bf16"):
        raise ValueError(
            f"mixed_precision is {accelerator.mixed_precision!r}: loss scaling changes gradients and skips steps; "
            "use bf16=True or float32"
        )
    name = type(getattr(optimizer, "optimizer", optimizer)).__name__
    if accelerator.has_lomo_optimizer or name == "LayerWiseDummyOptimizer":
        raise NotImplementedError(f"{name} steps during backward, so no complete gradient exists; use adamw_torch")
    parallel = accelerator.parallelism_config
    for axis in ("tp", "cp", "sp"):
        if parallel is not None and getattr(parallel, f"{axis}_size") > 1:
            raise NotImplementedError(f"{axis}_size is above 1: only data parallelism is supported; set it to 1")


def sharded_engine(
    accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer, max_grad_norm: float
) -> Fsdp2Engine:
    """
    The engine of a model that `fully_shard` has sharded, by accelerate or by hand.

    Raises:
        NotImplementedError: if a parameter is not sharded, or over more than one dimension of processes.
    """
    reshard(model)
    for name, param in model.named_parameters():
        if not isinstance(param, DTensor):
            raise NotImplementedError(f"{name!r} is not sharded by FSDP2 (fsdp_ignored_modules?); {_WORKS}")
        if param.placements != (Shard(0),):
            raise NotImplementedError(
                f"{name!r} is sharded as {param.placements}: only whole shards over one dimension of processes are "
                "supported; set dp_replicate_size to 1"
            )
    return Fsdp2Engine(accelerator, model, optimizer, max_grad_norm)


def upcasts_when_sharding(mixed_precision: bool) -> bool:
    """
    Whether accelerate makes float32 of all trained parameters when it prepares the model, as it does for FSDP2 with
    mixed precision (accelerate 1.15, `fsdp2_prepare_model`). False before there is an `Accelerator`.
    """
    shares = AcceleratorState._shared_state
    plugin = shares.get("fsdp_plugin")
    is_fsdp2 = shares.get("distributed_type") == DistributedType.FSDP and getattr(plugin, "fsdp_version", 1) == 2
    return mixed_precision and is_fsdp2


def _refuse_fsdp(accelerator: Accelerator) -> None:
    plugin = accelerator.state.fsdp_plugin
    if plugin.fsdp_version != 2:
        raise NotImplementedError(f"FSDP of version {plugin.fsdp_version} is not supported; set fsdp_version: 2")
    if isinstance(plugin.cpu_offload, CPUOffloadPolicy):
        raise NotImplementedError("the parameters are offloaded; set fsdp_offload_params: false")
    if plugin.activation_checkpointing:
        raise NotImplementedError(
            "fsdp_activation_checkpointing wraps the layers in modules that probes cannot look through; set it to "
            "false, and gradient_checkpointing: true in the training arguments"
        )


def _refuse_plain(accelerator: Accelerator, model: nn.Module) -> None:
    if any(isinstance(param, DTensor) for param in model.parameters()):
        raise NotImplementedError(f"the model has sharded parameters (DTensor); {_WORKS}")
    if isinstance(model, nn.DataParallel):
        raise ValueError("torch.nn.DataParallel splits batches in one process; start with `accelerate launch` (DDP)")
    if accelerator.num_processes > 1 and not isinstance(model, DistributedDataParallel):
        raise ValueError(
            f"{accelerator.num_processes} processes ({accelerator.distributed_type.value}) but the model is a "
            f"{type(model).__name__}, which averages no gradients; use distributed_type: MULTI_GPU, "
            "with use_cpu: true on a CPU (trl-entropy configs ddp-cpu)"
        )
    if any(param.requires_grad and param.dtype == torch.float16 for param in model.parameters()):
        raise ValueError("the model has float16 parameters; load it with dtype='float32' or 'bfloat16'")


def _refuse_deepspeed(engine: Any) -> None:
    stage = int(engine.zero_optimization_stage())
    if stage not in (1, 2, 3):
        raise NotImplementedError(f"DeepSpeed ZeRO stage {stage} is not supported; set zero_stage: 2 (or 1, 3)")
    if _is_offloaded(engine.zero_offload_optimizer()):
        raise NotImplementedError("the optimizer is offloaded; set offload_optimizer_device: none")
    if _is_offloaded(engine.zero_offload_param()):
        raise NotImplementedError("the parameters are offloaded; set offload_param_device: none")
    if engine.fp16_enabled():
        raise ValueError("DeepSpeed trains in float16 with loss scaling; use bf16=True or float32")
    refused = {
        "torch_autocast": engine.torch_autocast_enabled(),
        "tensor_parallel (autotp_size)": engine.autotp_size() > 1,
        "sequence parallelism": engine.sequence_parallel_size > 1,
        "mixture-of-experts layers of DeepSpeed": engine.has_moe_layers,
        "pipeline parallelism": engine.pipeline_parallelism,
        "the optimizer Muon of DeepSpeed": "muon" in type(engine.basic_optimizer).__name__.lower(),
        # Slices are laid out in the shuffled order, but `_hp_mapping` is built in the unshuffled one.
        "round_robin_gradients": engine.zero_round_robin_gradients(),
        # Slices on other ranks than the optimizer's, or of other numbers than the parameter's.
        "zero_hpz_partition_size above 1": engine.zero_hpz_partition_size() > 1,
        "zero_quantized_weights": engine.zero_quantized_weights(),
        "zero_quantized_nontrainable_weights": engine.zero_quantized_nontrainable_weights(),
        "deepcompile": engine.is_deepcompile_enabled(),
    }
    for what in (what for what, found in refused.items() if found):
        raise NotImplementedError(f"DeepSpeed with {what} is not supported; turn it off in the DeepSpeed config")
    if type(engine.optimizer).__name__ not in _ZERO_OPTIMIZERS:
        raise NotImplementedError(
            f"DeepSpeed's optimizer is a {type(engine.optimizer).__name__}; set zero_stage: 2 and no zenflow"
        )
    quantised = [name for name, param in engine.module.named_parameters() if not param.is_floating_point()]
    if stage == 3 and quantised:
        raise NotImplementedError(
            f"ZeRO-3 has partitioned the quantised {quantised[0]!r}; load bfloat16, or set zero_stage: 2"
        )


def _is_offloaded(offload: Any) -> bool:
    return offload is not None and str(getattr(offload.device, "value", offload.device)) != "none"
