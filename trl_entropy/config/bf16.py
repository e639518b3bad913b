"""bfloat16 is TRL's default; what transformers says where it cannot be had names neither that nor the way out."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


@contextlib.contextmanager
def explaining_bf16() -> Iterator[None]:
    """Inside, a refusal of bf16 by `TrainingArguments` says what to set. Written against transformers 5.23."""
    try:
        yield
    except ValueError as error:
        if "support bf16/gpu" not in str(error):
            raise
        raise ValueError(
            "bf16 is true (TRL's default), but this machine has no GPU that computes in bfloat16. On a CPU set "
            "use_cpu=True and bf16=False; on an older GPU bf16=False."
        ) from error
