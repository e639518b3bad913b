"""Runs `trl_entropy.NAME`'s `main` as `python -m` would, without DeepSpeed's minute of compiling a CPU op.

accelerate launch --config_file launch/zero2-cpu.yaml tests/distributed/run_module.py NAME ARGUMENTS...
"""

import importlib
import os
import sys

import torch

if __name__ == "__main__":
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        import deepspeed.comm  # noqa: F401

        sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None
    importlib.import_module(f"trl_entropy.{sys.argv[1]}").main(sys.argv[2:])
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
