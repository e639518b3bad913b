"""A plain PyTorch loop on two processes: DDP, and FSDP2 by hand; what `watch_step` says of each of its steps.

torchrun --nproc_per_node 2 tests/distributed/watch_worker.py OUTPUT_FILE
"""

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from engine_worker import VOCABULARY, build_model
from rank_script import leave
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

PROMPT, LENGTH = 3, 5


def rows(num_sequences: int, seed: int) -> torch.Tensor:
    shape = (num_sequences, PROMPT + LENGTH)
    return torch.randint(VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


def sharded(model: torch.nn.Module) -> torch.nn.Module:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def train(kind: str) -> list[dict[str, float]]:
    """Two steps, each watched on 8 completions of 4 prompts, spread over the processes."""
    from trl_entropy import watch_step

    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    model = {"plain": lambda m: m, "ddp": DistributedDataParallel, "fsdp2": sharded}[kind](build_model(lora=False))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    found = []
    for step in range(2):
        mine = rows(8, seed=step).tensor_split(world_size)[rank]
        optimizer.zero_grad()
        model(input_ids=mine, labels=mine).loss.backward()
        ids = rows(8, seed=10 + step).tensor_split(world_size)[rank]
        prompts = torch.arange(4).repeat_interleave(2).tensor_split(world_size)[rank]
        mask = torch.ones(len(ids), LENGTH, dtype=torch.long)
        with watch_step(model, optimizer, ids, torch.ones_like(ids), mask, prompts) as watched:
            optimizer.step()
        found.append(watched.as_dict())
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    numbers = {kind: train(kind) for kind in ("ddp", "fsdp2")}
    if dist.get_rank() == 0:
        Path(sys.argv[1]).write_text(json.dumps(numbers))
    leave()
