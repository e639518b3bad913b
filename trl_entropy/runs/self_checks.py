"""
The probes' self-checks: relative differences between two ways to the same number, which only rounding may part.

The console during training and the page afterwards warn by this rule. This module imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from trl_entropy.runs.metrics import METRICS

SELF_CHECK_LIMIT = 1e-2
_KEYS = tuple(key for key, metric in METRICS.items() if metric.is_self_check)


def failed_self_checks(row: Mapping[str, object]) -> dict[str, float]:
    """
    The self-checks that are further from 0 than [`SELF_CHECK_LIMIT`], by key.

    Args:
        row: the metrics of a step. A nan is no failure: 0/0 where the step has no gradient.
    """
    values = {key: row[key] for key in _KEYS if key in row}
    return {
        key: float(value)
        for key, value in values.items()
        if isinstance(value, int | float) and not math.isnan(value) and abs(value) > SELF_CHECK_LIMIT
    }


def advice() -> str:
    """What makes a self-check fail, and what to do about it, in whole sentences."""
    return (
        "The probe computed the same number in two ways, and they differ by more than rounding: what it scores is not "
        "what training computed, so that its other numbers cannot be trusted at these steps. Likely causes: dropout "
        "in the model or in its adapter, mixed precision (bf16 or fp16), a kernel of attention or of experts that "
        "rounds otherwise or depends on the batch, absolute positions that ignore padding, prompt learning (peft's "
        "virtual tokens), a sampler other than the policy that is scored, and a learning rate so small that the "
        "parameters' rounding outweighs the step. Turn these off one at a time, in float32, until the check passes. "
        "AdamW's first steps can fail by themselves, since they make as much of gradients that are rounding as of any "
        "others: then later steps pass."
    )
