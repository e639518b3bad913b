"""Which operations CUDA refuses when their tensors are on two devices, and for which of them the CPU waits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

COPIES = {"copy_", "_to_copy", "set_", "_foreach_copy_"}
INDEXING = {"index", "_unsafe_index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index_put"}
# Beside pointwise operations, what takes a CPU tensor of no dimension for a number.
TAKES_A_NUMBER = {"fill_", "fill", "masked_fill", "masked_fill_", "index_fill", "index_fill_"}
# Operations whose result's size, or the result itself, the CPU must wait for.
READS = {
    "_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2", "unique_dim",
    "unique_consecutive", "bincount", "histc",
}  # fmt: skip


def name_of(operation: Any) -> str:
    """`add_` of `aten::add_.Tensor`."""
    return operation._schema.name.partition("::")[2]


def tensors_in(values: object) -> list[Tensor]:
    """The tensors in nested lists, tuples and dictionaries, in order."""
    if isinstance(values, Tensor):
        return [values]
    if isinstance(values, dict):
        values = list(values.values())
    if not isinstance(values, (list, tuple)):
        return []
    return [tensor for value in values for tensor in tensors_in(value)]


def is_refused(operation: Any, args: Any, given: list[Tensor], on_device: list[bool]) -> bool:
    """Whether CUDA refuses an operation; `on_device` says which of the tensors that it is given are on the device."""
    name = name_of(operation)
    if all(on_device) or not any(on_device) or name in COPIES:
        return False
    cpu = [tensor for tensor, on in zip(given, on_device, strict=True) if not on]
    if name in INDEXING:  # indices may be on the CPU, unless what they index is there
        values = {id(tensor) for tensor in tensors_in(args[2:3])}
        return not on_device[0] or any(tensor.dim() and id(tensor) in values for tensor in cpu)
    takes_numbers = torch.Tag.pointwise in operation.tags or name in TAKES_A_NUMBER or name.startswith("_foreach_")
    changes_cpu = name.endswith("_") and not on_device[0]
    return not takes_numbers or changes_cpu or any(tensor.dim() for tensor in cpu)


def is_a_read(operation: Any, args: Any, kwargs: Any) -> bool:
    """Whether the CPU waits: for a number, or for a size, as of a selection by a mask or of unknown repetitions."""
    name = name_of(operation)
    masks = tensors_in(args[1]) if name in INDEXING else ()
    repeats = name == "repeat_interleave" and kwargs.get("output_size") is None
    return name in READS or repeats or any(mask.dtype == torch.bool for mask in masks)
