"""A self-check fails beyond its limit, by what the table of metrics says of a key and not by a list of names."""

import pytest

from trl_entropy.runs.metrics import METRICS, Metric
from trl_entropy.runs.self_checks import SELF_CHECK_LIMIT, advice, failed_self_checks


def test_the_table_says_which_keys_are_self_checks():
    found = {name for name, metric in METRICS.items() if metric.is_self_check}
    assert {"entropy/attribution_rounding", "entropy/rollouts_gradient_error", "noise_scale/gradient_error"} <= found
    assert not [name for name in found if "delta" in name or "error_" in name or "stderr" in name]
    assert Metric("fisher/product_error", "1", "").is_self_check
    assert not Metric("mine/some_error", "nats/token", "").is_self_check


@pytest.mark.parametrize("value, fails", [
    (SELF_CHECK_LIMIT, False), (0.0101, True), (-0.72, True), (float("inf"), True), (float("nan"), False),
    (None, False),
])  # fmt: skip
def test_beyond_the_limit_on_either_side(value, fails):
    row = {"step": 3, "entropy/error_linear": 5.0, "loss": 0.5, "entropy/attribution_rounding": value}
    assert failed_self_checks(row) == ({"entropy/attribution_rounding": value} if fails else {})


def test_the_advice_names_the_likely_causes():
    for cause in ("dropout", "mixed precision", "kernel", "absolute positions", "prompt learning", "sampler"):
        assert cause in advice()
