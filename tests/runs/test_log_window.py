"""What trackers get of several steps: each key's own reduction."""

import json
import math

import pytest

from trl_entropy.runs.log_window import LogWindow
from trl_entropy.runs.metrics import METRICS, over_steps

STEPS = [3.0, -1.0, 4.0, 2.0]


def reduced(key, values):
    window = LogWindow()
    for value in values:
        window.add({key: [value]})
    return window.reduced()[key]


@pytest.mark.parametrize("key, expected", [
    ("reward", 2.0),
    ("my/own_key", 2.0),
    ("entropy/delta_measured_stderr", math.sqrt(9 + 1 + 16 + 4) / 4),  # of a mean of independent values
    ("entropy/delta_cross_prompt_stderr_unbiased", math.sqrt(30) / 4),
    ("my/own_key_stderr", math.sqrt(30) / 4),
    ("my/share_of_stderrors", 2.0),
    ("entropy/integral_measured", 2.0 * 1),
    ("entropy/cross_linear_corrected_slope_stderr", 2.0),
    ("noise_scale/simple_upper", 2.0),
    ("noise_scale/adam_signal_to_noise_stderr", 2.0),
    ("num_tokens", 2.0),
    ("ratio/max", 4.0),
    ("completions/max_length", 4.0),
    ("completions/min_length", -1.0),
])  # fmt: skip
def test_each_key_has_its_own_reduction(key, expected):
    assert reduced(key, STEPS) == pytest.approx(expected, rel=1e-15)


def test_totals_and_pooled_values_are_those_of_the_last_step():
    """By what they are, whatever their names: a new key of these kinds must say so in the table."""
    for key, metric in METRICS.items():
        if any(word in metric.help for word in ("so far", "since", "pooled", "over the last")):
            assert over_steps(key) == over_steps(f"{key}_stderr") == "last", key
        if metric.reduce == "max" or metric.help.startswith(("largest importance", "largest difference")):
            assert over_steps(key) == "max", key
    assert {over_steps(key) for key in METRICS} == {"mean", "last", "max", "min", "error"}


def test_nan_counts_only_where_there_is_nothing_else():
    assert reduced("reward", [math.nan, 1.0, 3.0]) == 2.0 and math.isnan(reduced("reward", [math.nan]))
    assert reduced("ratio/max", [math.nan, 1.0]) == 1.0 and math.isnan(reduced("completions/min_length", [math.nan]))
    assert math.isnan(reduced("entropy/integral_linear", [1.0, math.nan]))
    assert reduced("reward", [1.0, math.inf]) == math.inf


@pytest.mark.parametrize("value", [1e-300, 0.1, 1e300, math.inf])
def test_one_value_is_itself_whatever_its_rule(value):
    for key in ("reward", "reward_stderr", "ratio/max", "completions/min_length", "learning_rate"):
        assert reduced(key, [value]) == value


def test_a_window_goes_on_where_it_was_saved():
    straight, first, second = LogWindow(), LogWindow(), LogWindow()
    steps = [{"reward": [0.1, math.nan], "x_stderr": [0.2]}, {"reward": [0.7], "ratio/max": [2.0]}]
    for step in steps:
        straight.add(step)
    first.add(steps[0])
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    second.add(steps[1])
    assert second.reduced() == straight.reduced()
    second.clear()
    assert second.reduced() == {}
