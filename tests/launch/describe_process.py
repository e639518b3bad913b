"""Writes what this process is under its launcher: OUTPUT_DIR/rank0.json, OUTPUT_DIR/rank1.json, ..."""

import json
import os
import sys
from pathlib import Path

if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
    import deepspeed.comm  # noqa: F401

    # DeepSpeed would compile it for a minute or two on a CPU, for nothing that is tested here.
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None

from accelerate import Accelerator
from transformers import TrainingArguments

# A bare Accelerator() on the CPU sees one process, whatever was launched: as in training, the arguments must say so.
TrainingArguments(output_dir=sys.argv[1], use_cpu=True, report_to="none")
accelerator = Accelerator()
plugin = accelerator.state.deepspeed_plugin
description = {
    "num_processes": accelerator.num_processes,
    "distributed_type": accelerator.distributed_type.value,
    "zero_stage": plugin and plugin.zero_stage,
    "device": accelerator.device.type,
    "local_rank": accelerator.local_process_index,
}
Path(sys.argv[1], f"rank{accelerator.process_index}.json").write_text(json.dumps(description))
accelerator.end_training()
