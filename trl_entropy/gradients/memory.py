"""
How many completions a pass takes at a time: as many as memory allows by formula, since a CPU gives no error to learn
from, and half of them whenever memory runs out all the same. What did not fit is not tried again.
"""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar
from weakref import WeakKeyDictionary

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch import nn

from trl_entropy.config.probe_checks import ProbeChecks
from trl_entropy.engine.parameters import num_slices, parameter_shape
from trl_entropy.gradients.footprint import Differentiated, LayerSizes, Pass, rows_that_fit
from trl_entropy.gradients.head_chunks import can_split
from trl_entropy.gradients.inputs import base_model
from trl_entropy.rollouts.completions import Completions

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

# Completions at a time if memory allows more: beyond it nothing becomes faster.
MOST_ROWS = 64
GIB = 2**30
# Of the memory beside the model, its gradients and its optimizer: what a pass may take, and what gradients of groups
# or completions may that are kept meanwhile. The rest is for training's own tensors and for the allocator's waste.
_PASS_SHARE, _ROWS_SHARE = 0.25, 0.6
_TRAINED_BYTES = 16
_CGROUP = Path("/sys/fs/cgroup")
_MEMINFO = Path("/proc/meminfo")
# Bytes within which passes of a model stay, since it ran out of memory with twice as many.
_LEARNED: WeakKeyDictionary[nn.Module, float] = WeakKeyDictionary()


def in_batches(
    function: Callable[[int], Result],
    model: nn.Module,
    completions: Completions,
    batch_size: int | None,
    order: int = 0,
    backward: Differentiated = "",
) -> Result:
    """
    `function` of the number of completions at a time; whenever memory runs out it is called again with half as many.

    The number follows from the shape of `completions` and from the *whole* memory of the device, so that a resumed run
    computes in the same batches, to the bit. Memory that others take at the moment counts where it would not suffice:
    on a CPU, which the system would end instead, before the first try.

    Args:
        batch_size: at most so many; None: `MOST_ROWS`.
        order, backward: see [`Pass`].

    Raises:
        Exception: whatever `function` raises, unless it is for want of memory and the size is above 1.
    """
    base = base_model(model)
    one_pass = pass_over(model, completions, order, backward)
    size = rows_at_once(model, completions, batch_size, order, backward)

    def learn(smaller: int) -> int:
        if one_pass is not None:
            _LEARNED[base] = one_pass.num_bytes(smaller)
        return smaller

    if one_pass is not None and completions.input_ids.device.type == "cpu":
        free = free_memory()
        while size > 1 and one_pass.num_bytes(size) > free:
            size = learn(size // 2)
    return halved_on_out_of_memory(function, size, learn)


def rows_at_once(
    model: nn.Module,
    completions: Completions,
    batch_size: int | None,
    order: int = 0,
    backward: Differentiated = "",
) -> int:
    """Completions at a time, see [`in_batches`]; at least one."""
    most = max(1, min(MOST_ROWS if batch_size is None else batch_size, len(completions)))
    one_pass = pass_over(model, completions, order, backward)
    if one_pass is None:
        return most
    device = completions.input_ids.device
    budget = min(pass_budget(total_memory(device), resident(model)), _LEARNED.get(base_model(model), float("inf")))
    return rows_that_fit(one_pass, budget, most)


def pass_over(model: nn.Module, completions: Completions, order: int, backward: Differentiated) -> Pass | None:
    """What the longest of `completions` need; None for a model without the configuration of transformers."""
    config = getattr(base_model(model), "config", None)
    if config is None or not hasattr(config, "get_text_config") or not len(completions):
        return None
    text, head = config.get_text_config(), base_model(model).get_output_embeddings()
    one = Pass(
        LayerSizes.of(text),
        length=completions.input_ids.shape[1],
        completion_length=completions.completion_mask.shape[1],
        order=order,
        backward=backward,
        on_cpu=completions.input_ids.device.type == "cpu",
        attention=text._attn_implementation or "sdpa",
        trains_head=head is not None and any(param.requires_grad for param in head.parameters()),
    )
    whole = dataclasses.replace(one, in_chunks=False)
    needs_chunks = whole.num_logits(len(completions)) > one.num_logits(len(completions))
    return whole if needs_chunks and not can_split(model, completions) else one


def halved_on_out_of_memory(
    function: Callable[[int], Result], size: int, learn: Callable[[int], int] = lambda size: size
) -> Result:
    """
    `function(size)`; whenever memory runs out it is called again with half the size, which `learn` is told.

    Instead of accelerate's `find_executable_batch_size`, which collects garbage before the first try too: that takes
    half the time of scoring a small batch.

    Raises:
        Exception: whatever `function` raises, unless it is for want of memory and `size` is above 1.
    """
    while True:
        try:
            return function(size)
        except Exception as error:
            if size == 1 or not should_reduce_batch_size(error):
                raise
        clear_device_cache(garbage_collection=True)
        size = learn(size // 2)
        logger.info("memory ran out: from now on %d completions of this shape at a time", size)


# ---- what there is


def pass_budget(total: float, resident: float) -> float:
    """Bytes that a pass of a probe may take of `total`, of which `resident` are the model's and the optimizer's."""
    return _PASS_SHARE * max(0.0, total - resident)


def rows_budget(total: float, resident: float, asked_gib: float | None) -> float:
    """
    Bytes that gradients of prompt groups or of completions may take: `probe_rows_gib`, or a share of what is left.
    """
    return asked_gib * GIB if asked_gib is not None else _ROWS_SHARE * max(0.0, total - resident)


def resident(model: nn.Module) -> int:
    """
    Bytes of the model in float32, as probes score it, and for each number that is trained those of its gradient,
    two moments and a copy: this process's slices where parameters are sliced. Under ZeRO-1 and ZeRO-2 less.
    """
    params = [(parameter_shape(param).numel(), param.requires_grad, num_slices(param)) for param in model.parameters()]
    return sum((4 + _TRAINED_BYTES * is_trained) * number // slices for number, is_trained, slices in params)


def rows_budget_of(args: ProbeChecks, model: nn.Module) -> float:
    """[`rows_budget`] of this process, in whole GiB of its device, so that equal devices have the same."""
    return rows_budget(total_memory(args.device) // GIB * GIB, resident(model), args.probe_rows_gib)


def total_memory(device: torch.device) -> float:
    """Bytes of the device; of the machine's memory, or of its container's, the share of one process on it."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return main_memory() / int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def main_memory() -> int:
    """The memory of the machine in bytes, or the limit of the container around this process."""
    installed = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min(installed, _number(_CGROUP / "memory.max", installed))


def free_memory() -> int:
    """Bytes of the machine, or of the container, that nothing has taken at the moment."""
    free = main_memory()
    if _MEMINFO.exists():
        found = next(line for line in _MEMINFO.read_text().splitlines() if line.startswith("MemAvailable"))
        free = min(free, 1024 * int(found.split()[1]))
    limit = _number(_CGROUP / "memory.max", 0)
    return min(free, limit - _number(_CGROUP / "memory.current", 0)) if limit else free


def _number(path: Path, otherwise: int) -> int:
    text = path.read_text().strip() if path.exists() else "max"
    return otherwise if text == "max" else int(text)
