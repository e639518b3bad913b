"""DeepSpeed ZeRO: each rank owns a slice of master, moments and gradient. Here ZeRO-1 and ZeRO-2; ZeRO-3 in `zero3`.

Written against accelerate 1.15 and deepspeed 0.19.8. Upstream privates, each with a contract test: `engine.step` is
called inside `accelerator.backward`; under ZeRO-1 and ZeRO-2 a parameter's `_hp_mapping` names the slice this rank
owns, with its master (`hp_fragment`), its place in the parameter (`lp_fragment_address`) and in the group's flat
partition (`hp_fragment_address`), and its reduced gradient (`get_lp_grad_fragment(param._index_in_param_group)`).

deepspeed's own `safe_get_full_*` are not used: with more than one parameter group they raise on the ranks that own a
slice and leave the others waiting.
"""

import abc
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from jaxtyping import Float
from torch import Tensor, nn

from trl_entropy.engine.base import Engine
from trl_entropy.engine.parameters import parameter_shape
from trl_entropy.engine.ranks import rank_symmetric
from trl_entropy.engine.reader import GroupSettings, group_settings, names_by_group

_BUCKET_NUMEL = 2**26  # elements of one all_reduce: 256 MiB of float32


class DeepSpeedEngine(Engine):
    """What every ZeRO stage shares: when it steps, and whole tensors from slices.

    theta is the float32 master, also where the model computes in bf16. A subclass also says which parameters are in
    which group of the base optimizer, and where in a parameter this rank's slice begins.
    """

    def __init__(self, accelerator: Accelerator, model: nn.Module) -> None:
        self._deepspeed: Any = accelerator.deepspeed_engine_wrapped.engine
        self._zero: Any = self._deepspeed.optimizer
        super().__init__(accelerator, model, self._zero.optimizer, float(self._deepspeed.gradient_clipping()))
        self._names_by_group = names_by_group(self.module, self._lp_groups())
        self._num_hooked_steps = 0
        self._hook_step()

    # ---- events: accelerate clips and steps inside `backward`, so only `engine.step` itself marks the moment

    def _hook_step(self) -> None:
        engine = self._deepspeed
        if "step" in vars(engine):
            raise RuntimeError("engine.step of DeepSpeed is wrapped already: close() the engine that was built before")
        original = engine.step

        @functools.wraps(original)
        def step(*args: object, **kwargs: object) -> object:
            if not engine.is_gradient_accumulation_boundary():
                return original(*args, **kwargs)
            self._num_hooked_steps += 1
            self._begin_update()
            result = original(*args, **kwargs)
            self._end_update()
            return result

        engine.step = step

    def gradients_ready(self) -> None:
        """Checks that the step was made meanwhile, inside `accelerator.backward`."""
        if self._num_hooked_steps != 1:
            raise RuntimeError(
                f"accelerator.backward called DeepSpeed's engine.step {self._num_hooked_steps} times for this update, "
                "expected once: use accelerate 1.15, or call gradients_ready() only if accelerator.sync_gradients"
            )
        self._num_hooked_steps = 0

    def update_done(self) -> None:
        """Does nothing: the wrapped `engine.step` has already reported the update."""

    def close(self) -> None:
        vars(self._deepspeed).pop("step", None)

    # ---- this rank's slices

    @abc.abstractmethod
    def _lp_groups(self) -> list[list[nn.Parameter]]:
        """The model's parameters by parameter group of the base optimizer, which itself has flat partitions."""

    @abc.abstractmethod
    def _start(self, param: nn.Parameter) -> int:
        """Where in the flat parameter this rank's slice begins."""

    # ---- whole tensors

    def assemble(self, shares: Mapping[str, Tensor], copy: bool = False) -> dict[str, Float[Tensor, "..."]]:
        return self._assembled(self.parameters, shares)

    def _assembled(self, parameters: Mapping[str, nn.Parameter], shares: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Whole float32 tensors of `parameters`. Collective."""
        with rank_symmetric(self.accelerator, "laying out its slices of the optimizer's state"):
            buckets = [self._bucket(bucket, shares) for bucket in buckets_of(parameters)]
        whole: dict[str, Tensor] = {}
        for flat, views in buckets:
            # Every element is owned by one rank and 0 on the others, so the sum is exact.
            dist.all_reduce(flat, group=self._zero.dp_process_group)
            whole |= views
        return whole

    def _bucket(
        self, parameters: Mapping[str, nn.Parameter], shares: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """One flat tensor with this rank's shares in their places, and its views by parameter."""
        shapes = [parameter_shape(param) for param in parameters.values()]
        sizes = [shape.numel() for shape in shapes]
        flat = torch.zeros(sum(sizes), dtype=torch.float32, device=self.accelerator.device)
        pieces = dict(zip(parameters, flat.split(sizes), strict=True))
        for name in (name for name in parameters if name in shares):
            share = shares[name]
            pieces[name].narrow(0, self._start(parameters[name]), share.numel()).copy_(share)
        return flat, {name: piece.view(shape) for (name, piece), shape in zip(pieces.items(), shapes, strict=True)}

    def add_to_theta(self, change: Mapping[str, Float[Tensor, "..."]]) -> None:
        with rank_symmetric(self.accelerator, "adding to its slices of the parameters"):
            for name, share in self.theta().items():
                start = self._start(self.parameters[name])
                share += change[name].reshape(-1)[start : start + share.numel()].to(share.device)
                self._set_share(name, share)
        self._theta_to_model()

    def _set_share(self, name: str, share: Tensor) -> None:
        """Writes `share` into this rank's slice of theta, where `theta` returns a copy of it."""

    @abc.abstractmethod
    def _theta_to_model(self) -> None:
        """Copies theta into the parameters that the model computes with, as DeepSpeed's step does. Collective."""

    def grad_norm(self) -> float:
        with rank_symmetric(self.accelerator, "taking the norm of its slices of the gradient"):
            squares = [torch.linalg.vector_norm(g.double()).square() for g in self.local_gradient().values()]
            total = sum(squares, torch.zeros((), dtype=torch.float64, device=self.accelerator.device))
        dist.all_reduce(total, group=self._zero.dp_process_group)
        return math.sqrt(float(total))

    # ---- the optimizer

    def param_groups(self) -> dict[str, GroupSettings]:
        return group_settings(self.optimizer.param_groups, self._names_by_group)

    def step_skipped(self) -> bool:
        return not self._deepspeed.was_step_applied()


class ZeroEngine(DeepSpeedEngine):
    """ZeRO-1 and ZeRO-2: one flat partition per parameter group, whose borders cut through parameters."""

    def _lp_groups(self) -> list[list[nn.Parameter]]:
        zero = self._zero
        return zero.bit16_groups if hasattr(zero, "bit16_groups") else zero.bf16_groups

    def _start(self, param: nn.Parameter) -> int:
        return param._hp_mapping.lp_fragment_address.start  # type: ignore[attr-defined]

    def _slices(self, read: Callable[[nn.Parameter, Any], Tensor]) -> dict[str, Tensor]:
        """`read(param, mapping)`, flat, for every parameter of which this rank owns a slice."""
        owned = ((name, param, param._hp_mapping) for name, param in self.parameters.items())
        return {name: read(param, mapping).view(-1) for name, param, mapping in owned if mapping is not None}

    def theta(self) -> dict[str, Tensor]:
        return self._slices(lambda param, mapping: mapping.hp_fragment.detach())

    def _theta_to_model(self) -> None:
        for name, value in self.assemble(self.theta()).items():
            self.parameters[name].data.copy_(value)

    def local_gradient(self) -> dict[str, Tensor]:
        return self._slices(_gradient_slice)

    def local_moment(self, key: str) -> dict[str, Tensor]:
        # Not through `get_optim_state_fragment`: deepspeed links only the first group's moments.
        def read(param: nn.Parameter, mapping: Any) -> Tensor:
            (partition,) = self.optimizer.param_groups[mapping.param_group_index]["params"]
            address = mapping.hp_fragment_address
            return self.optimizer.state[partition][key].narrow(0, address.start, address.numel)

        return self._slices(read) if any(self.optimizer.state.values()) else {}

    def step_counts(self) -> dict[str, int]:
        counts: dict[str, int] = {}
        for group, names in zip(self.optimizer.param_groups, self._names_by_group, strict=True):
            (partition,) = group["params"]
            step = self.optimizer.state.get(partition, {}).get("step", 0)
            counts |= dict.fromkeys(names, int(step))
        return counts


def _gradient_slice(param: nn.Parameter, mapping: Any) -> Tensor:
    """This rank's slice of a parameter's reduced gradient.

    BF16_Optimizer (ZeRO-1 in bf16 with float32 accumulation) holds the whole parameter's gradient on every rank.
    """
    gradient, address = mapping.get_lp_grad_fragment(param._index_in_param_group).view(-1), mapping.lp_fragment_address
    return gradient if gradient.numel() == address.numel else gradient.narrow(0, address.start, address.numel)


def buckets_of(parameters: Mapping[str, nn.Parameter]) -> Iterator[dict[str, nn.Parameter]]:
    """`parameters` in their order, in parts that one `all_reduce` takes."""
    bucket: dict[str, nn.Parameter] = {}
    numel = 0
    for name, param in parameters.items():
        size = parameter_shape(param).numel()
        if bucket and numel + size > _BUCKET_NUMEL:
            yield bucket
            bucket, numel = {}, 0
        bucket[name] = param
        numel += size
    if bucket:
        yield bucket
