"""Halves a batch when memory runs out, and goes on."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

Result = TypeVar("Result")


def halved_on_out_of_memory(function: Callable[[int], Result], size: int) -> Result:
    """
    `function(size)`, with the size halved as long as memory does not suffice.

    Accelerate's `find_executable_batch_size` collects garbage before the first try too, which takes half the time of
    scoring a small batch.
    """
    while True:
        try:
            return function(size)
        except Exception as error:
            if size == 1 or not should_reduce_batch_size(error):
                raise
        clear_device_cache(garbage_collection=True)
        size //= 2
