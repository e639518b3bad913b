"""
What each prompt group adds to the loss gradient, Y_n of (T14), from training's own backward or by an extra pass; and
the squared norm of what each micro-batch adds (T15).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from trl_entropy.engine.parameters import trainable_parameters
from trl_entropy.estimators.noise.noise_scale import GroupProducts, half_advantages
from trl_entropy.estimators.rows.row_sums import (
    Consumer,
    DotProducts,
    HalfProducts,
    Rows,
    RowTotal,
    Several,
    SquaredNorms,
)
from trl_entropy.gradients.group_gradients import token_scores
from trl_entropy.gradients.loss_coefficients import LossCoefficients
from trl_entropy.gradients.memory import in_batches
from trl_entropy.gradients.sequence_gradients import SequenceGradients
from trl_entropy.rollouts.completions import Completions

AnyConsumer = TypeVar("AnyConsumer", bound=Consumer)
Vector = Mapping[str, Float[Tensor, "..."]]


class BackwardGroupGradients:
    """
    Each prompt group's share of this process's gradient, one float32 row of D numbers, from training's own backward.

    Shares are summed over the step's micro-batches. The loss may be any that is a sum over completions. Local. One
    instance serves a run, step after step; training stays bit-identical.

    Args:
        model: unwrapped, without a trained language-model head: TRL's fused head bypasses the hooks, so its gradient
            is not available.
        num_groups: of this process, at most.
    """

    def __init__(self, model: nn.Module, num_groups: int) -> None:
        self._num_groups = num_groups
        self._buffer: Tensor | None = None
        self._collector = SequenceGradients(model)
        self._numbers: dict[int, int] = {}
        self._open = contextlib.ExitStack()

    @contextlib.contextmanager
    def micro_batch(self, prompt_index: Int[Tensor, " B"]) -> Iterator[None]:
        """Around the forward and backward of a micro-batch with these groups."""
        if not self._numbers:
            self._rows = Rows(self._num_groups, out=self._buffer)
            self._collector.consume(self._rows)
        numbers = [self._numbers.setdefault(index, len(self._numbers)) for index in prompt_index.tolist()]
        with self._open:
            self._open.enter_context(self._collector)
            self._open.enter_context(self._collector.batch(torch.tensor(numbers)))
            yield

    def finish(self) -> tuple[Float[Tensor, "P D"], Int[Tensor, " P"]]:
        """
        The step's rows, until the next begins, and their groups; may be called inside the last micro-batch, after its
        backward.
        """
        self._open.close()
        prompt_index, self._numbers = torch.tensor(list(self._numbers)), {}
        values = self._rows.values
        # A CPU takes longer to get new memory than to fill it; that of a GPU is free again until the next step.
        self._buffer = values if values.device.type == "cpu" else None
        del self._rows
        self._collector.consume()
        return values[: len(prompt_index)], prompt_index


class MicroBatchNorms:
    """
    (T15): |A s_k|^2 of a step's A micro-batches, where s_k is what micro-batch k adds to this process's gradient.

    A s_k is the mean gradient of the micro-batch. Hooks read it where it is added to each parameter's `.grad`, before
    processes are averaged; so model, loss and engine may be any, and the memory is that of the largest parameter.
    Under FSDP2 gradients arrive at the whole parameters that a module has while it runs, so they are read there.
    Local. One instance serves a run; training stays bit-identical.
    """

    def __init__(self, model: nn.Module, num_generations: int) -> None:
        self._model, self._num_generations = model, num_generations
        self._sq_norms: list[Tensor] = []
        self._read: set[tuple[nn.Module, str]] = set()  # where gradients were read under FSDP2

    @contextlib.contextmanager
    def micro_batch(self, prompt_index: Int[Tensor, " B"]) -> Iterator[None]:
        """Around the forward and backward of a micro-batch of whole groups."""
        counts = prompt_index.unique(return_counts=True)[1]
        if (counts != self._num_generations).any():
            raise ValueError(
                f"a micro-batch has {counts.tolist()} completions of its prompts: (T15) needs whole groups in each. "
                "Set per_device_train_batch_size to a multiple of num_generations, or noise_scale_from='groups'"
            )
        sq_norm = torch.zeros((), dtype=torch.float64, device=next(self._model.parameters()).device)

        def add(gradient: Tensor) -> None:
            # A sum of squares, not a BLAS product, whose float32 sums of 10^7 numbers are 3e-4 off
            sq_norm.add_(gradient.detach().float().square().sum())

        self._sq_norms.append(sq_norm)
        with contextlib.ExitStack() as hooks:
            if isinstance(self._model, FSDPModule):
                self._read_whole_parameters(add, hooks)
            else:
                for param in trainable_parameters(self._model).values():
                    hooks.callback(param.register_hook(add).remove)
            yield

    def _read_whole_parameters(self, add: Callable[[Tensor], None], hooks: contextlib.ExitStack) -> None:
        """Sets the hooks when a module's forward begins, behind FSDP2's own that gathers; once for each parameter."""
        found: set[int] = set()

        def watch(module: nn.Module, _: object) -> None:
            for key, param in module._parameters.items():
                if param is not None and param.requires_grad:
                    self._read.add((module, key))
                    if id(param) not in found:  # recomputing activations runs a module twice
                        found.add(id(param))
                        hooks.callback(param.register_hook(add).remove)

        for module in self._model.modules():
            hooks.callback(module.register_forward_pre_hook(watch).remove)

    def finish(self) -> Float[Tensor, " A"]:
        """
        The step's norms; may be called inside the last micro-batch, after its backward.

        Raises:
            ValueError: under FSDP2, if a parameter has a gradient and its module's forward never ran.
        """
        sq_norms, self._sq_norms = torch.stack(self._sq_norms), []
        if isinstance(self._model, FSDPModule):
            read = {id(module._parameters[key]) for module, key in self._read}
            for name, param in trainable_parameters(self._model).items():
                if param.grad is not None and id(param) not in read:
                    raise ValueError(
                        f"the gradient of {name!r} could not be read under FSDP2, since it is used outside of its "
                        "module's forward: set noise_scale_from='groups', or train with DDP or ZeRO"
                    )
            self._read.clear()
        return len(sq_norms) ** 2 * sq_norms


def products_by_extra_pass(
    model: nn.Module,
    completions: Completions,
    coefficients: LossCoefficients,
    temperature: float,
    gradient: Vector,
    metric: Vector | None,
    batch_size: int | None,
) -> tuple[list[GroupProducts], Vector]:
    """
    |Y_n|^2 and Y_n . g of the step's loss, the same in the metric, groups in the order of their number, and the mean
    Y_n of this process by parameter.

    Of the groups' gradients only the mean is kept: memory does not grow with the number of groups. Local; leaves no
    `.grad`.

    Args:
        model: unwrapped, in the mode and with the parameters it is to be differentiated at. Plain logits.
        completions: whole groups; rows of a group need not follow one another.
        coefficients: how the step's loss depends on their scores, times P of all processes.
        temperature: sampling temperature.
        gradient, metric: g and, where there is one, the diagonal of M (T16), by parameter name.
        batch_size: completions at a time, at most, but at least one group; None: as many as memory allows.
    """
    metrics = [None] if metric is None else [None, metric]
    vectors = [gradient, *({name: m * gradient[name] for name, m in one.items()} for one in metrics if one)]
    prompts, row_numbers = completions.prompt_index.unique(return_inverse=True)

    def consumers() -> Several:
        norms = (SquaredNorms(len(prompts), one) for one in metrics)
        return Several(*norms, DotProducts(len(prompts), vectors), RowTotal())

    made = _consumed_by_groups(model, completions, coefficients, temperature, row_numbers, consumers, batch_size)
    *products, total = made.consumers
    assert isinstance(total, RowTotal)
    *norms, dots = (consumer.values for consumer in products)
    mean = {name: value / len(prompts) for name, value in total.by_name.items()}
    return [GroupProducts(n, d) for n, d in zip(norms, dots, strict=True)], mean


def half_products(
    model: nn.Module,
    completions: Completions,
    rewards: Float[Tensor, " B"],
    temperature: float,
    max_length: int,
    batch_size: int | None,
) -> Float[Tensor, " P"]:
    """
    Y_a . Y_b, the gradients of every group's two halves, for the between-prompt part of (T14), by an extra pass.

    As [`products_by_extra_pass`] with the on-policy Dr-GRPO loss (T2), of `max_length` L, but each half has advantages
    of its own, from `rewards` (see `half_advantages`).
    """
    prompts, groups = completions.prompt_index.unique(return_inverse=True)
    by_group = groups.argsort(stable=True).view(len(prompts), -1)
    advantages, row_numbers = torch.empty_like(rewards, dtype=torch.float64), 2 * groups
    advantages[by_group] = half_advantages(rewards[by_group])
    row_numbers[by_group[:, by_group.shape[1] // 2 :]] += 1

    def consumer() -> HalfProducts:
        return HalfProducts(len(prompts))

    coefficients = LossCoefficients.on_policy(advantages, completions.loss_mask, by_group.shape[1], max_length)
    return _consumed_by_groups(model, completions, coefficients, temperature, row_numbers, consumer, batch_size).values


def _consumed_by_groups(
    model: nn.Module,
    completions: Completions,
    coefficients: LossCoefficients,
    temperature: float,
    row_numbers: Int[Tensor, " B"],
    make_consumer: Callable[[], AnyConsumer],
    batch_size: int | None,
) -> AnyConsumer:
    """The consumer after a pass with whole groups in each batch; a new one for each try, when memory runs out."""
    groups, sizes = completions.prompt_index.unique(return_counts=True)

    def all_groups(rows_at_once: int) -> AnyConsumer:
        consumer, groups_at_once = make_consumer(), max(1, rows_at_once // int(sizes.max()))
        with SequenceGradients(model, consumer, weight_gradients=False) as collector:
            for some in groups.split(groups_at_once):
                index = torch.isin(completions.prompt_index, some).nonzero().squeeze(1)
                rows = completions.rows(index).trimmed()
                loss = coefficients.surrogate(*token_scores(model, rows, temperature), rows.loss_mask, index)
                with collector.batch(row_numbers[index]):
                    loss.backward()
        return consumer

    with torch.enable_grad():
        return in_batches(all_groups, model, completions, batch_size, backward="logps")
