"""What transformers and TRL log of an evaluation, as a row of `evaluation/metrics.csv`."""

from __future__ import annotations

import re
from collections.abc import Mapping

from trl_entropy.runs.strict_json import Row


def evaluation_of(logs: Mapping[str, object]) -> tuple[Row, str]:
    """
    The numbers of an evaluation without their prefix, and the name of its set where the run has several.

    transformers puts the name into its own keys (`eval_NAME_runtime`, which is always there), TRL does not.
    """
    found = (re.fullmatch(r"eval_(.+)_runtime", key, re.DOTALL) for key in logs)
    name = next((match[1] for match in found if match), "")
    prefixes = (f"eval_{name}_", "eval_") if name else ("eval_",)
    row: Row = {}
    for key, value in logs.items():
        prefix = next((prefix for prefix in prefixes if key.startswith(prefix)), "")
        row[key.removeprefix(prefix)] = value
    return row, name
