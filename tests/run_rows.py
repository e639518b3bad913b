"""Rows of `metrics.jsonl` for a comparison."""

import json

from trl_entropy.runs.strict_json import to_line


def without_clocks(rows, leave_out=()):
    """The rows as JSON has them, in which nan equals nan, without clocks and keys that begin as `leave_out` says."""
    kept = [{k: v for k, v in row.items() if "time" not in k and "per_second" not in k} for row in rows]
    return [json.loads(to_line({k: v for k, v in row.items() if not k.startswith(leave_out)})) for row in kept]
