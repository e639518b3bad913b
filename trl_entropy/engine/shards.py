"""`ShardedEngine`: each rank owns a slice of every parameter, gradient and moment; whole tensors from slices."""

import abc
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from trl_entropy.engine.base import Engine
from trl_entropy.engine.parameters import parameter_shape
from trl_entropy.engine.ranks import rank_symmetric

_BUCKET_NUMEL = 2**26  # elements of one all_reduce: 256 MiB of float32


class ShardedEngine(Engine):
    """
    DeepSpeed ZeRO and FSDP2. A slice is a run of a parameter's numbers in the order of its memory, so it is handed
    around flat. A subclass says where this rank's slice begins, and which processes own the others.
    """

    # ---- this rank's slices

    @property
    @abc.abstractmethod
    def _group(self) -> dist.ProcessGroup:
        """The processes that own one slice each."""

    @abc.abstractmethod
    def _start(self, param: nn.Parameter) -> int:
        """Where in the flat parameter this rank's slice begins."""

    # ---- whole tensors

    def assemble(self, shares: Mapping[str, Tensor], copy: bool = False) -> Mapping[str, Float[Tensor, "..."]]:
        return self._assembled(self.parameters, shares)

    def _assembled(self, parameters: Mapping[str, nn.Parameter], shares: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Whole float32 tensors of `parameters`. Collective."""
        with rank_symmetric(self.accelerator, "laying out its slices of the optimizer's state"):
            buckets = [self._bucket(bucket, shares) for bucket in buckets_of(parameters)]
        whole: dict[str, Tensor] = {}
        for flat, views in buckets:
            # Every element is owned by one rank and 0 on the others, so the sum is exact.
            dist.all_reduce(flat, group=self._group)
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

    def _theta_to_model(self) -> None:
        """Copies theta into the parameters that the model computes with, where these are others. Collective."""

    def grad_norm(self) -> float:
        with rank_symmetric(self.accelerator, "taking the norm of its slices of the gradient"):
            squares = [torch.linalg.vector_norm(g.double()).square() for g in self.local_gradient().values()]
            total = sum(squares, torch.zeros((), dtype=torch.float64, device=self.accelerator.device))
        dist.all_reduce(total, group=self._group)
        return math.sqrt(float(total))


@contextmanager
def without_hooks(handles: Sequence[RemovableHandle]) -> Iterator[None]:
    """Takes module hooks out for a while; afterwards they are back in their order."""
    tables = [(handle.hooks_dict_ref() or {}, handle.id) for handle in handles]
    before = [(hooks, list(hooks)) for hooks, _ in tables]
    taken = [(hooks, key, hooks.pop(key)) for hooks, key in tables if key in hooks]
    try:
        yield
    finally:
        for hooks, key, hook in taken:
            hooks[key] = hook
        for hooks, order in before:
            for key in (key for key in order if key in hooks):
                hooks[key] = hooks.pop(key)


def buckets_of(
    parameters: Mapping[str, nn.Parameter], most_numel: int = _BUCKET_NUMEL
) -> Iterator[dict[str, nn.Parameter]]:
    """`parameters` in their order, in parts of so many elements, or of one parameter, that one `all_reduce` takes."""
    bucket: dict[str, nn.Parameter] = {}
    numel = 0
    for name, param in parameters.items():
        size = parameter_shape(param).numel()
        if bucket and numel + size > most_numel:
            yield bucket
            bucket, numel = {}, 0
        bucket[name] = param
        numel += size
    if bucket:
        yield bucket
