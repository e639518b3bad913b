"""Runs `trl_entropy.NAME`'s `main` as `python -m` would, without DeepSpeed's minute of compiling a CPU op.

accelerate launch --config_file launch/zero2-cpu.yaml tests/distributed/run_module.py NAME ARGUMENTS...
"""

import importlib
import sys

from rank_script import leave, prepare_rank

if __name__ == "__main__":
    prepare_rank()
    importlib.import_module(f"trl_entropy.{sys.argv[1]}").main(sys.argv[2:])
    leave()
