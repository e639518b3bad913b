"""FSDP2 rehearsed on a CPU: there accelerate trains with DDP without a word, since it keeps FSDP for accelerators."""

import functools
import logging
import os

from accelerate import Accelerator, state
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

logger = logging.getLogger(__name__)


def asks_for_fsdp2() -> bool:
    """Whether `accelerate launch` was given a configuration of FSDP2."""
    asked = os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("1", "true")
    return asked and os.environ.get("FSDP_VERSION") == "2"


def warn_if_unsharded(accelerator: Accelerator) -> None:
    """Say on the main process that training is DDP where FSDP2 was asked for; accelerate does not."""
    if asks_for_fsdp2() and accelerator.distributed_type == DistributedType.MULTI_CPU and accelerator.is_main_process:
        logger.warning(
            "FSDP2 was asked for, but accelerate trains with DDP on a CPU. To shard there, call "
            "trl_entropy.engine.fsdp2_on_cpu.shard_on_cpu_if_asked() before the trainer or the Accelerator is made."
        )


def shard_on_cpu_if_asked() -> None:
    """
    Where `accelerate launch` was given FSDP2, an `Accelerator` without an accelerator shards too, from now on.

    Written against accelerate 1.15, whose `AcceleratorState` chooses the plugin, and copies what the processes share
    from `PartialState`.
    """
    original = state.AcceleratorState.__init__
    if not asks_for_fsdp2() or getattr(original, "shards_on_cpu", False):
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
