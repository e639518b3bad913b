"""FSDP2 (`fully_shard`): each rank owns a slice of every parameter, frozen ones included, and of its optimizer state.

Written against torch 2.13 and accelerate 1.15. Parameters, gradients and moments are DTensors, cut along dimension 0,
so that a rank's part is a run of numbers. Upstream privates, each with a contract test: `_get_fsdp_state()` of a
module has the hooks that gather its parameters (`_pre_forward_hook_handle`, `_post_forward_hook_handle`) and the
dtypes it computes in (`_mp_policy`); `register_fsdp_forward_method` puts a gathering `generate` among the module's own
attributes.
"""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.utils.hooks import RemovableHandle

from trl_entropy.engine.parameters import original_class
from trl_entropy.engine.plain import PlainEngine
from trl_entropy.engine.shards import without_hooks
from trl_entropy.engine.sliced_parameters import SlicedParameters


class Fsdp2Engine(SlicedParameters, PlainEngine):
    """
    FSDP2. theta is the sharded parameters themselves, float32 where `bf16=True`; the layers compute in bf16 then.

    Between a forward and the next backward some modules hold whole parameters; reading and scoring put the slices
    back, which costs no communication, and the next forward gathers anew.
    """

    def __init__(
        self, accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer, max_grad_norm: float
    ) -> None:
        reshard(accelerator.unwrap_model(model))
        super().__init__(accelerator, model, optimizer, max_grad_norm)

    # ---- this rank's slices

    @property
    def _group(self) -> dist.ProcessGroup:
        return next(iter(self.parameters.values())).device_mesh.get_group()

    def _start(self, param: nn.Parameter) -> int:
        # As `torch.chunk` cuts dimension 0: the last ranks may have fewer rows, or none.
        rows, mesh = len(param), param.device_mesh
        first = min(mesh.get_local_rank() * -(-rows // mesh.size()), rows)
        return first * (param.numel() // rows)

    def theta(self) -> dict[str, Tensor]:
        return {name: _slice(param) for name, param in self.parameters.items()}

    def local_gradient(self) -> dict[str, Tensor]:
        return {name: _slice(param.grad) for name, param in self.parameters.items() if param.grad is not None}

    def local_moment(self, key: str) -> dict[str, Tensor]:
        return {name: _slice(value) for name, value in super().local_moment(key).items()}

    def grad_norm(self) -> float:
        # torch's own function, as clipping uses it: of the ranks' parts, in the gradients' dtype.
        grads = [param.grad for param in self.parameters.values() if param.grad is not None]
        norm = torch.nn.utils.get_total_norm(grads)
        return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)

    # ---- scoring

    def scoring_model(
        self,
        params: Mapping[str, Float[Tensor, "..."]],
        dtype: torch.dtype | None = torch.float32,
        differentiated: bool = True,
    ) -> AbstractContextManager[nn.Module]:
        """As [`SlicedParameters.scoring_model`]."""
        reshard(self.module)
        return super().scoring_model(params, dtype, differentiated)

    @contextmanager
    def _as_one_process(self, dtype: torch.dtype | None) -> Iterator[None]:
        with without_hooks(_gathering_hooks(self.module)), _as_written(self.module):
            yield

    def _frozen_slice(self, param: nn.Parameter) -> Tensor:
        return _slice(param)

    def _computing_dtype(self, param: nn.Parameter) -> torch.dtype:
        # In its own dtype the model is the one that training runs, which gathers parameters in the policy's dtype.
        return _states(self.module)[0]._mp_policy.param_dtype or param.dtype


def _slice(tensor: Tensor) -> Tensor:
    """This rank's numbers, flat; the live memory."""
    assert isinstance(tensor, DTensor)
    return tensor.detach().to_local().view(-1)


def reshard(module: nn.Module) -> None:
    """Lets every module hold its slices, also those that stay whole between forward and backward. Local."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def _states(module: nn.Module) -> list[Any]:
    """FSDP's state of every group of parameters; that of the root is the first."""
    states = [part._get_fsdp_state() for part in module.modules() if isinstance(part, FSDPModule)]
    return list({id(state): state for state in states}.values())


def _gathering_hooks(module: nn.Module) -> list[RemovableHandle]:
    handles = [
        handle
        for state in _states(module)
        for handle in (state._pre_forward_hook_handle, state._post_forward_hook_handle)
    ]
    # Modules that form one group have one handle for all their hooks.
    return [single for handle in handles for single in getattr(handle, "handles", (handle,))]


@contextmanager
def _as_written(module: nn.Module) -> Iterator[None]:
    """Gives every module its author's class for a while, by which layers are known, and that class's `generate`."""
    classes = {part: type(part) for part in module.modules() if isinstance(part, FSDPModule)}
    own = vars(module).pop("generate", None)
    try:
        for part in classes:
            part.__class__ = original_class(part)
        yield
    finally:
        for part, kind in classes.items():
            part.__class__ = kind
        if own is not None:
            vars(module)["generate"] = own
