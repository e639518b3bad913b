"""Checks of a run before it starts: all of them in `trl-entropy doctor`, a summary at the start of training."""

from trl_entropy.preflight.plan import Plan
from trl_entropy.preflight.report import full_report, memory_remedy, short_report

__all__ = ["Plan", "full_report", "memory_remedy", "short_report"]
