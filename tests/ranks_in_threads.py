"""Ranks as threads of this process, for what only exchanges tensors: sums, and rows in the order of the ranks."""

import threading
from collections.abc import Callable
from unittest.mock import Mock

import torch
from accelerate import Accelerator
from torch import Tensor


def on_ranks(num_ranks: int, work: Callable[[int, Accelerator], object]) -> list:
    """What `work(rank, accelerator)` returns on each rank; one that exchanges less than the others ends them all."""
    barrier, sent = threading.Barrier(num_ranks, timeout=60), [None] * num_ranks
    results: list = [None] * num_ranks
    errors: list[BaseException] = []

    def exchanged(rank: int, value: Tensor) -> list[Tensor]:
        sent[rank] = value
        barrier.wait()
        values = list(sent)
        barrier.wait()  # nobody sends the next one before all have read this one
        return values

    def padded(rank: int, rows: Tensor, dim: int) -> Tensor:
        width = max(other.shape[dim] for other in exchanged(rank, rows))
        return torch.nn.functional.pad(rows, (0, width - rows.shape[dim]))

    def run(rank: int) -> None:
        accelerator = Mock(spec=Accelerator, process_index=rank, num_processes=num_ranks, is_main_process=rank == 0)
        accelerator.device = torch.device("cpu")
        accelerator.gather.side_effect = lambda value: torch.cat(exchanged(rank, value))
        accelerator.reduce.side_effect = lambda value, reduction="sum": torch.stack(exchanged(rank, value)).sum(0)
        accelerator.pad_across_processes.side_effect = lambda rows, dim=1: padded(rank, rows, dim)
        try:
            results[rank] = work(rank, accelerator)
        except BaseException as error:
            errors.append(error)
            barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(num_ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise next((one for one in errors if not isinstance(one, threading.BrokenBarrierError)), errors[0])
    return results
