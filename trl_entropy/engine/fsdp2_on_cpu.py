"""FSDP2 rehearsed on a CPU: there accelerate trains with DDP without a word, since it keeps FSDP for accelerators."""

import functools
import os

from accelerate import state
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin


def shard_on_cpu_if_asked() -> None:
    """
    Where `accelerate launch` was given FSDP2, an `Accelerator` without an accelerator shards too, from now on.

    Written against accelerate 1.15, whose `AcceleratorState` chooses the plugin, and copies what the processes share
    from `PartialState`.
    """
    asked = (
        os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("1", "true") and os.environ.get("FSDP_VERSION") == "2"
    )
    original = state.AcceleratorState.__init__
    if not asked or getattr(original, "shards_on_cpu", False):
        return

    @functools.wraps(original)
    def init(
        self: state.AcceleratorState,
        *args: object,
        fsdp_plugin: FullyShardedDataParallelPlugin | None = None,
        **kwargs: object,
    ) -> None:
        original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            state.PartialState._shared_state["distributed_type"] = self.distributed_type = DistributedType.FSDP
            if self.mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self.mixed_precision)
            self.fsdp_plugin = fsdp_plugin

    init.shards_on_cpu = True  # type: ignore[attr-defined]
    state.AcceleratorState.__init__ = init
