"""`Metric`: what is known of a key of `metrics.jsonl`. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """
    One key of `metrics.jsonl`.

    A key of the probe batch E is about all training prompts (those that `curriculum` chose, where E is the next step's
    completions), or about those of `eval_dataset`. A key of the step's own
    completions is about the prompts that were drawn; with `curriculum`, that is how the curriculum draws them. With
    `resample_uninformative_groups`, `"U"` and `"groups"` are about the groups whose rewards differ only, and
    `entropy/policy` and the other keys of the step's completions include groups that could not be replaced. TRL's keys
    on rewards and completions are about the prompts as first drawn. A probe file says which it is, in the entry
    `distribution` of its metadata.

    Attributes:
        reduce: what is summed over ranks and micro-batches before the one division: `"sum"`; `"max"`; `"histogram"`;
            `"E"`, sums over each completion of the probe batch; `"U"`, products between the prompt groups of the
            step's own completions (`entropy_probe_completions="rollouts"`); `"groups"`, the products of each prompt
            group's gradient with the whole gradient and with itself; `"pairs"`, products between all pairs of
            completions; `"none"`, all ranks have the same number; `"TRL"`, as TRL does it.
        over_steps: what trackers get of the values of several steps, with `logging_steps` above 1: `"mean"`, over the
            steps that have the key; `"last"`, of a total, of a state, of what is pooled over the run so far, and of
            shares of a single step, whose mean is the share of nothing; `"max"`; `"min"`. The standard error of a mean
            is that of a mean of independent values, that of a last value is the last one.
    """

    name: str
    unit: str
    help: str
    reduce: str = "sum"
    over_steps: str = "mean"

    @property
    def is_self_check(self) -> bool:
        """
        Whether this is the relative difference between two ways to the same number, and so rounding alone.

        Such a key has the unit 1 and a name that ends in `_error` or `_rounding`.
        """
        return self.unit == "1" and self.name.endswith(("_error", "_rounding"))

    @property
    def can_be_undefined(self) -> bool:
        """
        Whether nan and infinities are ordinary values of this key.

        So it is with ratios and statistics (unit 1), which have no value where the denominator is 0 or the steps so
        far are too few, with numbers of prompts and completions that are ratios, with ends of intervals, and with
        means over completions of a kind that a step may lack.
        """
        of_a_ratio = self.reduce != "TRL" and (self.unit in ("1", "prompts", "completions") or " per " in self.unit)
        return of_a_ratio or self.name.endswith(("_low", "_high", "_lower", "_upper", "/think_length"))


def keys(
    reduce: str, rows: Iterable[tuple[str, str, str]], prefix: str = "", over_steps: str = "mean"
) -> list[Metric]:
    """Metrics of rows of name, unit and meaning."""
    return [Metric(prefix + name, unit_, text, reduce, over_steps) for name, unit_, text in rows]
