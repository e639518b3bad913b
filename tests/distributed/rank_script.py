"""What every script that a test launches on several ranks begins and ends with."""

import gc
import os
import sys
from typing import NoReturn

import torch


def prepare_rank() -> None:
    """
    Lets FSDP2 shard on a CPU, and DeepSpeed compile nothing: that takes a minute or two, for nothing that is tested.
    """
    from trl_entropy.engine.fsdp2_on_cpu import shard_on_cpu_if_asked

    shard_on_cpu_if_asked()
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        import deepspeed.comm  # noqa: F401

        sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None
    import trl_entropy.trainer.dr_grpo  # noqa: F401

    gc.freeze()  # every training ends with a full collection, which need not pass over what is loaded


def leave() -> NoReturn:
    """End the process group and the process, not the interpreter.

    Something below the Trainer keeps gloo's threads alive past `destroy_process_group`; one that lets go of a tensor
    while the interpreter ends aborts the process ("terminate called without an active exception").
    """
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
