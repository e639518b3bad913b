"""What vLLM's engine needs where TRL builds it inside the training process (`vllm_mode="colocate"`)."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from typing import Any

import torch


@contextlib.contextmanager
def built_for_training(args: Any) -> Iterator[None]:
    """
    Build vLLM's engine inside this context: it meets no other run, and on a CPU it computes with what a step loads.

    Nothing happens without `use_vllm` and in server mode. Written against TRL 1.16 and vLLM 0.28 to 0.30.
    """
    if not args.use_vllm or args.vllm_mode != "colocate":
        yield
        return
    choose_port()
    with weights_that_can_be_loaded():
        yield


def choose_port() -> None:
    """
    Give a run of one process, which no launcher gave a port, one that the system has free.

    TRL takes 29500 where nobody listens there yet, and so do two runs that begin at the same moment.
    """
    alone = os.environ.get("WORLD_SIZE", "1") == "1" and not torch.distributed.is_initialized()
    if alone and os.environ.get("MASTER_PORT", "").strip().lower() in ("", "0", "auto"):
        with socket.socket() as server:
            server.bind(("127.0.0.1", 0))
            os.environ["MASTER_PORT"] = str(server.getsockname()[1])


@contextlib.contextmanager
def weights_that_can_be_loaded() -> Iterator[None]:
    """
    Let an engine that is built for a CPU compute with the weights that TRL loads into it after each step.

    vLLM packs the weights of linear layers for its CPU kernels as soon as it has loaded them. It drops the originals
    of all but the head (`remove_weight`), so that TRL cannot load others; the head would go on with those of the
    start. Here the layers keep their weights as they are, and compute with torch's `linear`. On a GPU nothing happens.
    """
    if not _computes_on_a_cpu():
        yield
        return
    from vllm.model_executor.layers import utils

    packed = utils.dispatch_cpu_unquantized_gemm
    utils.dispatch_cpu_unquantized_gemm = _unpacked
    try:
        yield
    finally:
        utils.dispatch_cpu_unquantized_gemm = packed


def _computes_on_a_cpu() -> bool:
    try:
        from vllm.platforms import current_platform
    except ModuleNotFoundError:  # TRL says what to install
        return False
    return bool(current_platform.is_cpu())


def _unpacked(layer: Any, remove_weight: bool) -> None:
    """For `dispatch_cpu_unquantized_gemm`: `layer.cpu_linear` computes with the weight that it is given."""
    layer.cpu_linear = torch.nn.functional.linear
