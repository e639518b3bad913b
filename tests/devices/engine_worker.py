"""A short training under the engine that `accelerate launch` has set; prints whether its numbers agree."""

from __future__ import annotations

import contextlib
import io
import json
import sys
import tempfile
from pathlib import Path

from tests.devices.gpu_rows import EVERY_PROBE, Verdict, consistent
from tests.devices.replayed import adapter, build_trainer
from trl_entropy import DrGRPOTrainer
from trl_entropy.runs.directory import RunDirectory


def verdict(device: str, engine: str) -> Verdict:
    """Of `"cuda"` or `"cpu"`, and zero2, zero3 or fsdp2."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = build_trainer(Path(folder), device == "cpu", lora=adapter(), bf16=True, **EVERY_PROBE)
        if (started := engine_of(trainer)) != engine:
            return Verdict("skipped" if device == "cpu" else "FAIL", f"accelerate has started {started} in its place")
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                trainer.train()
        except NotImplementedError as refusal:  # the package's own sentence
            return Verdict("refused", str(refusal))
        return consistent(RunDirectory(folder).metrics()[-1])


def engine_of(trainer: DrGRPOTrainer) -> str:
    """By accelerate's own account."""
    accelerator = trainer.accelerator
    kind = accelerator.distributed_type.value.lower()
    if kind == "deepspeed":
        return f"zero{accelerator.deepspeed_plugin.zero_stage}"
    return f"fsdp{accelerator.state.fsdp_plugin.fsdp_version}" if kind == "fsdp" else kind


if __name__ == "__main__":
    print("verdict " + json.dumps(verdict(*sys.argv[1:])), flush=True)
