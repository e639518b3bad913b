"""A short training under the engine that `accelerate launch` has set; prints whether its numbers agree."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

from tests.devices.gpu_rows import EVERY_PROBE, Verdict, consistent
from tests.devices.replayed import adapter, train


def verdict(device: str) -> Verdict:
    try:
        with tempfile.TemporaryDirectory() as folder:
            _, rows = train(Path(folder), device == "cpu", lora=adapter(), bf16=True, **EVERY_PROBE)
    except NotImplementedError as refusal:  # the package's own sentence
        return Verdict("refused", str(refusal))
    return consistent(rows[-1])


if __name__ == "__main__":
    print("verdict " + json.dumps(verdict(sys.argv[1])), flush=True)
