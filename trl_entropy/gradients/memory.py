"""What to do when a pass needs more memory than there is: the same with half the batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

Result = TypeVar("Result")


def halved_on_out_of_memory(function: Callable[[int], Result], size: int) -> Result:
    """
    `function(size)`; whenever memory runs out it is called again with half the size.

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
        size //= 2
