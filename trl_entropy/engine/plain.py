"""One process, or DDP: every rank holds everything, and DDP has averaged the gradient when backward returns."""

from collections.abc import Mapping, Sequence

import torch
from accelerate import Accelerator
from jaxtyping import Float
from torch import Tensor, nn

from trl_entropy.engine.base import Engine
from trl_entropy.engine.reader import GroupSettings, group_settings, names_by_group


class PlainEngine(Engine):
    """Plain training and DDP. theta is the parameters themselves: with `bf16=True` autocast leaves them float32."""

    def __init__(
        self, accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer, max_grad_norm: float
    ) -> None:
        super().__init__(accelerator, model, optimizer, max_grad_norm)
        self._names_by_group = names_by_group(self.module, [group["params"] for group in optimizer.param_groups])

    def gradients_ready(self) -> None:
        self._begin_update()

    def update_done(self) -> None:
        self._end_update()

    def close(self) -> None:
        """Does nothing: no hook was set."""

    def theta(self) -> dict[str, Tensor]:
        return {name: param.detach() for name, param in self.parameters.items()}

    def local_gradient(self) -> dict[str, Tensor]:
        return {name: param.grad for name, param in self.parameters.items() if param.grad is not None}

    def without_gradient(self) -> frozenset[str]:
        return frozenset(name for name, param in self.parameters.items() if param.grad is None)

    def local_moment(self, key: str) -> dict[str, Tensor]:
        state = self.optimizer.state
        return {name: state[param][key] for name, param in self.parameters.items() if key in state.get(param, {})}

    @property
    def holds_whole_state(self) -> bool:
        return type(self) is PlainEngine

    def optimizer_state(self, keys: Sequence[str]) -> dict[str, dict[str, Tensor]]:
        copies: dict[str, dict[str, Tensor]] = {}
        for name, param in self.parameters.items():
            found = {key: self.optimizer.state.get(param, {}).get(key) for key in keys}
            wide = torch.promote_types(param.dtype, torch.float32)
            copies[name] = {
                key: value.to(wide, copy=True) for key, value in found.items() if isinstance(value, Tensor)
            }
        return copies

    def assemble(self, shares: Mapping[str, Tensor], copy: bool = False) -> Mapping[str, Float[Tensor, "..."]]:
        whole = {}
        for name, param in self.parameters.items():
            dtype = torch.promote_types(param.dtype, torch.float32)
            share = shares.get(name)
            whole[name] = torch.zeros_like(param, dtype=dtype) if share is None else share.to(dtype, copy=copy)
        return whole

    def add_to_theta(self, change: Mapping[str, Float[Tensor, "..."]]) -> None:
        for name, param in self.parameters.items():
            param.data.add_(change[name])

    def grad_norm(self) -> float:
        # torch's own function on the gradients' own dtype, so that the norm is the one clipping uses, to the bit.
        return float(torch.nn.utils.get_total_norm(list(self.local_gradient().values())))

    def param_groups(self) -> dict[str, GroupSettings]:
        return group_settings(self.optimizer.param_groups, self._names_by_group)

    def step_counts(self) -> dict[str, int]:
        names = [name for name, param in self.parameters.items() if param.grad is not None]
        state = self.optimizer.state
        counts = [torch.as_tensor(state.get(self.parameters[name], {}).get("step", 0)) for name in names]
        # Unless it is fused, AdamW counts on the CPU. So: read where they are, one stack for each device.
        done: dict[str, int] = {}
        for device in dict.fromkeys(count.device for count in counts):
            own = {name: count for name, count in zip(names, counts, strict=True) if count.device == device}
            read = torch.stack([count.detach().reshape(()).double() for count in own.values()]).long().tolist()
            done |= zip(own, read, strict=True)
        return done
