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
from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn

from trl_entropy.engine.reader import GroupSettings, group_settings, names_by_group
from trl_entropy.engine.shards import ShardedEngine


class DeepSpeedEngine(ShardedEngine):
    """What every ZeRO stage shares: when it steps.

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

    @property
    def _group(self) -> dist.ProcessGroup:
        return self._zero.dp_process_group

    @abc.abstractmethod
    def _lp_groups(self) -> list[list[nn.Parameter]]:
        """The model's parameters by parameter group of the base optimizer, which itself has flat partitions."""

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
