"""One run's metrics against another's that differ in rounding only."""

import math

import pytest

CLOCKS = ("time", "step_time", "epoch", "runtime")
# Ratios of differences of nearly equal numbers, from a few pairs of steps.
ILL_CONDITIONED = ("_slope", "r_squared", "correlation")


def rounding_of(row: dict) -> float:
    """What float32 leaves of a change: the difference of two entropies of this size, nats."""
    return 3e-7 * row["entropy/probe_batch"]


def width_of(row: dict, key: str) -> float:
    """The width of the interval of a key, or that it is an end of, which may be near 0; 0 for another key."""
    name, _, end = key.rpartition("_")
    name = name if end in ("low", "high") else key
    width = row[f"{name}_high"] - row[f"{name}_low"] if f"{name}_low" in row else 0.0
    return width if math.isfinite(width) else 0.0


def largest_deviation(expected: list[dict], got: list[dict]) -> tuple[float, str]:
    """Asserts that all metrics agree; the largest relative deviation beyond rounding, and its metric."""
    largest = (0.0, "")
    for one, two in zip(expected, got, strict=True):
        assert one.keys() == two.keys(), f"only in one of them: {one.keys() ^ two.keys()}"
        rounding = rounding_of(one)
        for key, value in one.items():
            if key.startswith(CLOCKS) or any(part in key for part in ILL_CONDITIONED):
                continue
            # Relative to the parts: 4e-5 on one kind of CPU, 1e-5 on another.
            if key == "entropy/attribution_rounding":
                assert max(abs(value), abs(two[key])) < max(1e-4, rounding / abs(one["entropy/delta_linear"]))
            elif key.endswith("gradient_error"):
                assert max(value, two[key]) < 1e-4  # nothing but rounding
            elif value is None or math.isnan(value):  # there is no such pair of completions
                assert two[key] is None or math.isnan(two[key]), key
            else:
                # A sum whose terms cancel has the rounding of its terms, as its standard error has their size.
                of_terms = 5e-4 * (one.get(f"{key}_stderr") or width_of(one, key))
                assert two[key] == pytest.approx(value, rel=1e-3, abs=max(rounding, of_terms)), key
                beyond = max(abs(two[key] - value) - rounding, 0.0)
                largest = max(largest, (beyond / abs(value) if beyond else 0.0, key))
    return largest
