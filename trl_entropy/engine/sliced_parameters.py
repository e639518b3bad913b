"""`SlicedParameters`: ZeRO-3 and FSDP2, where no process holds a parameter whole."""

from __future__ import annotations

import abc
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn

from trl_entropy.engine.machine_memory import MachineTensors
from trl_entropy.engine.parameters import parameter_shape, replaced_tensors, trainable_parameters
from trl_entropy.engine.read_when_used import Reader, Remade, read_when_used
from trl_entropy.engine.shards import ShardedEngine, buckets_of

_BUCKET_NUMEL = 2**22  # elements that are gathered at a time, or one parameter: 16 MiB of float32


class SlicedParameters(ShardedEngine):
    """
    What is whole lies in main memory, once on each machine, and on a device one tensor at a time: vectors over the
    trained parameters that were asked for, and in `scoring_model` the frozen parameters.
    """

    _frozen: tuple[tuple[object, ...], MachineTensors] | None = None

    @abc.abstractmethod
    def _frozen_slice(self, param: nn.Parameter) -> Tensor:
        """This rank's slice of a parameter that is not trained, flat."""

    @abc.abstractmethod
    def _as_one_process(self, dtype: torch.dtype | None) -> AbstractContextManager[object]:
        """The model without what the engine does around its layers, as its author wrote it. Local."""

    @abc.abstractmethod
    def _computing_dtype(self, param: nn.Parameter) -> torch.dtype:
        """Of a parameter while training computes with it."""

    # ---- whole tensors

    def assemble(self, shares: Mapping[str, Tensor], copy: bool = False) -> Mapping[str, Float[Tensor, "..."]]:
        sizes = {name: (parameter_shape(param), torch.float32) for name, param in self.parameters.items()}
        buckets = buckets_of(self.parameters, _BUCKET_NUMEL)
        return MachineTensors(sizes, (self._assembled(bucket, shares) for bucket in buckets), self.accelerator)

    def _frozen_tensors(self) -> Mapping[str, Tensor]:
        """Those that are not trained, each in its own dtype; gathered once, and again if they have changed."""
        frozen = {name: param for name, param in self.module.named_parameters() if not param.requires_grad}
        if not frozen:
            return {}
        slices = {name: self._frozen_slice(param) for name, param in frozen.items()}
        state = tuple((name, one.data_ptr(), one._version) for name, one in slices.items())
        changed = torch.tensor(float(self._frozen is None or self._frozen[0] != state), device=self.accelerator.device)
        dist.all_reduce(changed, op=dist.ReduceOp.MAX, group=self._group)
        if self._frozen is None or changed:
            self._frozen = None  # its memory is free before the next is taken
            sizes = {name: (parameter_shape(param), param.dtype) for name, param in frozen.items()}
            parts = (self._assembled(bucket, slices) for bucket in buckets_of(frozen, _BUCKET_NUMEL))
            self._frozen = state, MachineTensors(sizes, parts, self.accelerator)
        return self._frozen[1]

    # ---- scoring

    @contextmanager
    def scoring_model(
        self,
        params: Mapping[str, Float[Tensor, "..."]],
        dtype: torch.dtype | None = torch.float32,
        differentiated: bool = True,
    ) -> Iterator[nn.Module]:
        """
        As [`Engine.scoring_model`], without the engine's own hooks; meanwhile a device holds one frozen parameter at a
        time, and with `differentiated=False` one trained one.

        *Entering is collective* where parameters are frozen (LoRA's base); everything after is local. Inside
        `rank_symmetric` enter it first: the gathering fails on all ranks or on none.
        """
        read = [self._frozen_tensors()]
        stand_ins = {id(param): self._stand_in(param, dtype) for param in self.module.parameters()}
        with ExitStack() as undo:
            undo.enter_context(self._as_one_process(dtype))
            undo.enter_context(replaced_tensors(self.module, stand_ins))
            if not differentiated and isinstance(params, MachineTensors):
                read, params = [*read, params], trainable_parameters(self.module)
            model = undo.enter_context(super().scoring_model(params, dtype))
            remade = Remade()
            undo.enter_context(read_when_used(model, _readers(model, read, remade)))
            undo.enter_context(remade.in_forward_of(model))
            yield model

    def _stand_in(self, param: nn.Parameter, dtype: torch.dtype | None) -> nn.Parameter:
        """In the place of a parameter, without memory; whoever computes with it all the same gets nan."""
        is_quantised = not param.is_floating_point()  # which is refused by name
        dtype = param.dtype if is_quantised else dtype or self._computing_dtype(param)
        value = torch.full((), 0 if is_quantised else math.nan, dtype=dtype, device=self.accelerator.device)
        return nn.Parameter(value.expand(parameter_shape(param)), requires_grad=param.requires_grad)


def _readers(model: nn.Module, read: Iterable[Mapping[str, Tensor]], remade: Remade) -> dict[int, Reader]:
    """By `id` of a parameter of the model as it is now, in that parameter's dtype."""

    def reader(values: Mapping[str, Tensor], name: str, dtype: torch.dtype) -> Reader:
        return remade.reader(lambda: values[name].to(dtype))

    placed = dict(model.named_parameters())
    return {id(placed[name]): reader(values, name, placed[name].dtype) for values in read for name in values}
