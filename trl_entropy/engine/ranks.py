"""Failing together: an exception on one rank becomes one message on all of them, instead of a hang."""

import itertools
import json
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch.distributed.distributed_c10d import _get_default_store
from transformers import TrainingArguments


@contextmanager
def rank_symmetric(accelerator: Accelerator, what: str) -> Iterator[None]:
    """Runs local work so that either every rank leaves it, or every rank raises the same `RuntimeError`.

    On exit the ranks agree on the first of them that failed (one `all_reduce` of one integer). Otherwise the rank that
    raised would leave, and the others would wait in the next collective until the backend's timeout.

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


class OtherRankFailed(RuntimeError):
    """Another rank failed first; says which, and with what."""


_SECONDS_TO_LEAVE = 15.0  # for a rank to notice by itself, through its backend, that another has left
_num_sections = itertools.count()


@contextmanager
def ending_together(accelerator: Accelerator) -> Iterator[None]:
    """Runs work that contains collectives, such as training, so that all ranks end when one raises an exception.

    A rank that fails outside `rank_symmetric` leaves the others waiting for it. Here it first writes a message into
    the process group's store and then raises its own exception. On the other ranks the pending collective either fails
    (gloo), and its error is replaced by the message; or it never returns (NCCL), and after 15 s the process prints the
    message and ends.

    With one process nothing is done. Every rank must enter it, equally often.

    Raises:
        OtherRankFailed: on the ranks that did not fail first, with rank and exception of the one that did.
    """
    if accelerator.num_processes == 1:
        yield
        return
    notice = _Notice(accelerator.process_index)
    try:
        with notice.watched():
            yield
    except Exception as error:
        what = notice.first_failure(f"{type(error).__name__}: {error}")
        if what is None:
            raise
        raise OtherRankFailed(what) from error


class _Notice:
    """One line in the process group's store, that of the first rank that failed."""

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._store, self._key = _get_default_store(), f"trl_entropy/failure/{next(_num_sections)}"

    def first_failure(self, text: str) -> str | None:
        """Records that this rank failed with `text`; returns what another rank recorded before, if it differs."""
        said = json.dumps([self._rank, text])
        with suppress(dist.DistError):  # the store has gone with the process that kept it
            said = self._store.compare_set(self._key, "", said).decode()
        rank, first = json.loads(said)
        return None if rank == self._rank or first == text else f"rank {rank} failed: {first}"

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Ends the process if it is still inside 15 s after another rank failed."""
        left = threading.Event()
        watcher = threading.Thread(target=self._watch, args=(left,), daemon=True)
        watcher.start()
        try:
            yield
        finally:
            left.set()
            watcher.join(timeout=5.0)

    def _watch(self, left: threading.Event) -> None:
        with suppress(dist.DistError):
            while not left.wait(1.0):
                if self._store.check([self._key]):
                    break
            if left.wait(_SECONDS_TO_LEAVE):
                return
            rank, first = json.loads(self._store.get(self._key))
            print(f"OtherRankFailed: rank {rank} failed: {first}", file=sys.stderr, flush=True)
            os._exit(1)


def any_rank(flag: bool, args: TrainingArguments) -> bool:
    """Whether the flag of any process is set. Collective."""
    if args.world_size == 1:
        return flag
    flags = torch.tensor(float(flag), device=args.device)
    torch.distributed.all_reduce(flags, op=torch.distributed.ReduceOp.MAX)
    return bool(flags)
