"""DeepSpeed ZeRO-3: each rank owns one slice of every parameter, frozen ones included, and of its optimizer state.

Events, norm of the gradient and clipping are those of every ZeRO stage: `deepspeed.py`.

Written against deepspeed 0.19.8. `safe_get_local_*` are its public readers of this rank's slice. Upstream privates,
each with a contract test: `param.ds_tensor` is this rank's slice of what the model computes with, `ds_tensor.ds_numel`
numbers on every rank, padded behind the parameter's end (`ds_numel`, `ds_shape`); `fp16_groups` are the parameters of
each flat partition of `fp32_partitioned_groups_flat`, `sub_group_to_group_id` its parameter group; module hooks fetch
and release parameters around every layer (`parameter_offload`'s `forward_hooks`, `backward_hooks`, `fwd_pre_hook`);
the engine's `module_forward_pre_hook` and `module_forward_post_hook` put tables of its own in place of every module's;
`torch.nn.functional.linear` is replaced by a function that has no forward mode and rounds before it adds the bias.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
import torch.distributed as dist
from deepspeed.runtime.zero.partition_parameters import InsertPostInitMethodToModuleSubClasses
from deepspeed.utils import (
    safe_get_local_fp32_param,
    safe_get_local_grad,
    safe_get_local_optimizer_state,
    safe_set_local_fp32_param,
)
from torch import Tensor, nn

from trl_entropy.engine.deepspeed import DeepSpeedEngine
from trl_entropy.engine.shards import without_hooks
from trl_entropy.engine.sliced_parameters import SlicedParameters


class Zero3Engine(SlicedParameters, DeepSpeedEngine):
    """ZeRO-3. Outside `scoring_model` the model's own parameters are empty; `parameter_shape` has their shapes."""

    # ---- this rank's slices

    def _lp_groups(self) -> list[list[nn.Parameter]]:
        groups: list[list[nn.Parameter]] = [[] for _ in self.optimizer.param_groups]
        for number, params in enumerate(self._zero.fp16_groups):
            groups[self._zero.sub_group_to_group_id[number]] += params
        return groups

    def _start(self, param: nn.Parameter) -> int:
        return min(dist.get_rank(self._zero.dp_process_group) * param.ds_tensor.ds_numel, param.ds_numel)

    def _own(self, param: nn.Parameter, padded: Tensor) -> Tensor:
        """A slice without the padding behind the parameter's end; empty where all of it is padding."""
        return padded.detach().view(-1)[: param.ds_numel - self._start(param)]

    def theta(self) -> dict[str, Tensor]:
        return {name: self._own(param, safe_get_local_fp32_param(param)) for name, param in self.parameters.items()}

    def _set_share(self, name: str, share: Tensor) -> None:
        param = self.parameters[name]
        safe_set_local_fp32_param(param, torch.nn.functional.pad(share, (0, param.ds_tensor.numel() - share.numel())))

    def _theta_to_model(self) -> None:
        for name, value in self.theta().items():
            param = self.parameters[name]
            self._own(param, param.ds_tensor).copy_(value)
        if persistent := self._zero.persistent_parameters:  # small ones, which stay whole on every rank
            persistent[0].partition(persistent)
            persistent[0].all_gather(persistent)

    def local_gradient(self) -> dict[str, Tensor]:
        return {name: self._own(param, safe_get_local_grad(param)) for name, param in self.parameters.items()}

    def local_moment(self, key: str) -> dict[str, Tensor]:
        if not any(self.optimizer.state.values()):
            return {}
        read = safe_get_local_optimizer_state
        return {name: self._own(param, read(param, key)) for name, param in self.parameters.items()}

    def step_counts(self) -> dict[str, int]:
        name_of = {id(param): name for name, param in self.parameters.items()}
        counts: dict[str, int] = {}
        for params, partition in zip(self._zero.fp16_groups, self._zero.fp32_partitioned_groups_flat, strict=True):
            step = int(self.optimizer.state.get(partition, {}).get("step", 0))
            counts |= dict.fromkeys((name_of[id(param)] for param in params), step)
        return counts

    # ---- scoring

    @contextmanager
    def _as_one_process(self, dtype: torch.dtype | None) -> Iterator[None]:
        offload, engine = self._zero.parameter_offload, self._deepspeed
        hooks = [engine.module_forward_pre_hook, engine.module_forward_post_hook]
        hooks += [offload.fwd_pre_hook, *offload.forward_hooks, *offload.backward_hooks]
        # In its own dtype the model is the one that training runs, with DeepSpeed's linear.
        linear = nullcontext() if dtype is None else _torch_linear()
        # Not by TRL's `remove_hooks` and `add_hooks`: they throw away DeepSpeed's trace of the order in which
        # layers fetch their parameters, and leave the hook at the root, in which the ranks wait for one another.
        with without_hooks(hooks), linear:
            yield

    def _computing_dtype(self, param: nn.Parameter) -> torch.dtype:
        return param.dtype

    def _frozen_slice(self, param: nn.Parameter) -> Tensor:
        return self._own(param, param.ds_tensor)


@contextmanager
def _torch_linear() -> Iterator[None]:
    """Puts torch's own `linear` back for a while, which has a forward mode."""
    current = nn.functional.linear
    nn.functional.linear = getattr(InsertPostInitMethodToModuleSubClasses, "linear_bk", current)
    try:
        yield
    finally:
        nn.functional.linear = current
