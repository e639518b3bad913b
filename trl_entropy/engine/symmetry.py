"""Failing together: an exception on one rank becomes the same exception on all of them, instead of a hang."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from accelerate import Accelerator


@contextmanager
def rank_symmetric(accelerator: Accelerator, what: str) -> Iterator[None]:
    """Runs local work so that either every rank leaves it, or every rank raises the same `RuntimeError`.

    On exit the ranks agree on the first of them that failed (one `all_reduce` of one integer). Without it the rank
    that raised would leave, and the others would wait in the next collective until the backend's timeout.

        with rank_symmetric(engine.accelerator, "scoring the probe batch"):
            logps = score(model, batch)         # local: any rank may run out of memory here
        total = engine.accelerator.reduce(logps.sum())  # collective: outside

    The discipline: *no collective inside* (nothing of `accelerator.reduce`, no forward through a DDP or DeepSpeed
    wrapper, no collective property of `UpdateContext`; only `scoring_model` may be entered, before anything else, as
    it fails on all ranks or on none), every rank enters every section in the same order, and no
    `return`, `break` or `continue` leaves one on some ranks only. Exceptions that end the process anyway
    (`KeyboardInterrupt`, `SystemExit`) pass at once; the launcher then ends the other ranks.

    With one process nothing is done and the original exception passes. Works as a decorator too.

    Args:
        accelerator: of the run.
        what: what the work is, for the message: "scoring the probe batch".

    Raises:
        RuntimeError: on all ranks, if any failed: first failing rank, `what`, type and text of its exception. On the
            rank itself the original is the cause.
    """
    if accelerator.num_processes == 1:
        yield
        return
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
    first = _first_failing_rank(accelerator, failed=failure is not None)
    if first is not None:
        raise RuntimeError(_message_of(first, failure, what)) from failure


def _first_failing_rank(accelerator: Accelerator, failed: bool) -> int | None:
    rank = accelerator.process_index if failed else accelerator.num_processes
    first = torch.tensor(rank, device=accelerator.device)
    dist.all_reduce(first, op=dist.ReduceOp.MIN)
    return int(first) if int(first) < accelerator.num_processes else None


def _message_of(rank: int, failure: Exception | None, what: str) -> str:
    """The message of the failing rank, known to all."""
    text = [None if failure is None else f"rank {rank} failed while {what}: {type(failure).__name__}: {failure}"]
    dist.broadcast_object_list(text, src=rank)
    return str(text[0])
