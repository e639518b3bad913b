"""Turns estimates into metrics: `name` and its standard error, `name_stderr`."""

from __future__ import annotations

from torch import Tensor

from trl_entropy.estimators.statistics.estimate import Estimate, Linearization


def changes_logged(quantity: str, changes: dict[str, Linearization], prompts: Tensor) -> dict[str, float]:
    """Metrics of each change and of each prediction's error (predicted - measured), with standard errors."""
    logged: dict[str, float] = {}
    for name, change in changes.items():
        logged |= with_stderr(f"{quantity}/delta_{name}", change.estimate(prompts))
        if name != "measured":
            logged |= with_stderr(f"{quantity}/error_{name}", (change - changes["measured"]).estimate(prompts))
    return logged


def with_stderr(name: str, estimate: Estimate) -> dict[str, float]:
    return {name: estimate.value, f"{name}_stderr": estimate.stderr}
