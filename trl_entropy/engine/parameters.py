"""Other values in a model's parameters, for scoring: the training's own tensors are set aside, never written to."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that training changes, by their name in `model.named_parameters()`; tied ones appear once."""
    return {name: param for name, param in model.named_parameters() if param.requires_grad}


def parameter_shape(param: nn.Parameter) -> torch.Size:
    """Shape of a parameter, also of one that ZeRO-3 has partitioned, whose own shape is empty."""
    return torch.Size(getattr(param, "ds_shape", param.shape))


def num_slices(param: nn.Parameter) -> int:
    """
    Among how many processes a parameter is sliced (ZeRO-3, FSDP2); also of what stands in its place, all numbers in
    the memory of one, while a probe scores.
    """
    stands_in = param.numel() > 1 and not any(param.stride())
    return dist.get_world_size() if isinstance(param, DTensor) or hasattr(param, "ds_id") or stands_in else 1


def original_class(module: nn.Module) -> type:
    """The module's class as its author has it: FSDP2 makes a subclass of its own of the modules that it shards."""
    kind = type(module)
    return kind.__mro__[2] if issubclass(kind, FSDPModule) else kind  # as `FSDPModule.__new__` finds it


def num_trainable(model: nn.Module) -> int:
    """How many numbers training changes: the elements of all trainable parameters."""
    return sum(parameter_shape(param).numel() for param in trainable_parameters(model).values())


def snapshot_parameters(model: nn.Module) -> dict[str, Float[Tensor, "..."]]:
    """Copies of the trainable parameters, in their own dtype and on their own device.

    These are what the model computes with. Where an engine trains in bf16 that is the rounded image of the float32
    master, which `UpdateContext.params_before` and `params_after` have.

    Raises:
        ValueError: if parameters are partitioned (ZeRO-3).
    """
    for name, param in trainable_parameters(model).items():
        _refuse_partitioned(name, param)
    return {name: param.detach().clone() for name, param in trainable_parameters(model).items()}


@contextmanager
def swapped_parameters(
    model: nn.Module, values: Mapping[str, Float[Tensor, "..."]], dtype: torch.dtype | None = None
) -> Iterator[nn.Module]:
    """Lets `model` compute with other values of its trainable parameters; afterwards, always, its own are back.

    The model's `nn.Parameter` objects are replaced by new ones for the time being. The old ones are never written to
    (assigning a `.data` of another dtype would silently drop the hooks by which DDP and DeepSpeed reduce gradients),
    so a graph that was built before stays valid, and nothing is copied unless a dtype changes. Inside, look the
    parameters up anew (`trainable_parameters(model)`) before differentiating by them. Local: no communication.

    Args:
        model: an unwrapped module: not DDP's wrapper, nor DeepSpeed's.
        values: for every trainable parameter, a tensor of its shape; read only.
        dtype: `None` rounds `values` to each parameter's own dtype. Otherwise everything that is floating point, the
            frozen parameters and the buffers too, has this dtype inside: a bf16 model computes in float32.

    Yields:
        `model`.

    Raises:
        ValueError: if names or shapes of `values` do not match, parameters are partitioned (ZeRO-3), or `dtype` is
            given and a frozen parameter is quantised.
    """
    trainable = trainable_parameters(model)
    _check_values(trainable, values)
    replacements = {id(param): _replacement(param, values[name], dtype) for name, param in trainable.items()}
    if dtype is not None:
        for name, frozen in model.named_parameters():
            if id(frozen) not in replacements:
                replacements[id(frozen)] = _converted(name, frozen, dtype)
        replacements |= {id(buffer): _cast_if_floating(buffer, dtype) for buffer in model.buffers()}
    with replaced_tensors(model, replacements):
        yield model


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[nn.Module]:
    """Turns off dropout and transformers' gradient checkpointing; every submodule's own mode is back afterwards.

    Reentrant checkpointing would refuse `torch.autograd.grad`.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield model
    finally:
        for module, training in modes:
            module.training = training


def _check_values(trainable: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> None:
    if missing := sorted(trainable.keys() - values.keys()):
        raise ValueError(f"no values for {len(missing)} trainable parameters, the first is {missing[0]!r}")
    if unknown := sorted(values.keys() - trainable.keys()):
        raise ValueError(f"values for {len(unknown)} names that are no trainable parameters: {unknown[0]!r}, ...")
    for name, param in trainable.items():
        _refuse_partitioned(name, param)
        if values[name].shape != param.shape:
            raise ValueError(f"{name!r} has shape {tuple(param.shape)}, its value {tuple(values[name].shape)}")


def _refuse_partitioned(name: str, param: nn.Parameter) -> None:
    if hasattr(param, "ds_id"):
        raise ValueError(
            f"{name!r} is partitioned by ZeRO-3; gather it first, or train with zero_stage: 2, as kl_every needs"
        )


def _replacement(param: nn.Parameter, value: Tensor, dtype: torch.dtype | None) -> nn.Parameter:
    return nn.Parameter(value.detach().to(device=param.device, dtype=dtype or param.dtype))


def _converted(name: str, frozen: nn.Parameter, dtype: torch.dtype) -> nn.Parameter:
    if not frozen.is_floating_point():
        raise ValueError(f"{name!r} is quantised ({frozen.dtype}) and cannot be scored in {dtype}; load bfloat16")
    return frozen if frozen.dtype == dtype else nn.Parameter(frozen.detach().to(dtype), requires_grad=False)


def _cast_if_floating(buffer: Tensor, dtype: torch.dtype) -> Tensor:
    return buffer.to(dtype) if buffer.is_floating_point() else buffer


@contextmanager
def replaced_tensors(model: nn.Module, replacements: Mapping[int, Tensor]) -> Iterator[None]:
    """Replaces every parameter and buffer by `replacements[id(tensor)]`, and afterwards puts the originals back."""
    places: list[tuple[dict[str, Tensor | None], str, Tensor]] = [
        (table, key, tensor)
        for module in model.modules()
        for table in (module._parameters, module._buffers)
        for key, tensor in table.items()
        if tensor is not None and id(tensor) in replacements
    ]
    try:
        for table, key, tensor in places:
            table[key] = replacements[id(tensor)]
        yield
    finally:
        for table, key, tensor in places:
            table[key] = tensor
