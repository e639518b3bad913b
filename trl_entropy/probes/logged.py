"""Turns estimates into metrics: `name` and its standard error, `name_stderr`."""

from __future__ import annotations

from trl_entropy.estimators.statistics.estimate import Estimate


def with_stderr(name: str, estimate: Estimate) -> dict[str, float]:
    return {name: estimate.value, f"{name}_stderr": estimate.stderr}
