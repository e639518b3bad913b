"""What a run will do, need and be refused, before it starts: `trl-entropy doctor`, and in short at every start."""

from trl_entropy.preflight.plan import Plan
from trl_entropy.preflight.report import full_report, short_report

__all__ = ["Plan", "full_report", "short_report"]
