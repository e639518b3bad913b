"""Figures take and return axes, and draw the numbers that they are given."""

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from trl_entropy.analysis import plots


@pytest.fixture
def axes():
    figure, axes = plt.subplots()
    yield axes
    plt.close(figure)


def evaluation(**intervals):
    return pd.DataFrame([
        {"step": step, "metric": "pass@1", "value": value, "low": value - 0.1, "high": value + 0.2, "unit": "1"}
        for step, value in ((20, 0.6), (0, 0.4))
    ])  # fmt: skip


def test_checkpoints_in_order_with_their_intervals(axes):
    assert plots.plot_checkpoints(axes, evaluation(), ["pass@1"]) is axes
    assert axes.lines[0].get_xydata().tolist() == [[0, 0.4], [20, 0.6]]
    segments = axes.collections[0].get_segments()
    assert np.allclose(segments, [[[0, 0.3], [0, 0.6]], [[20, 0.5], [20, 0.8]]])


def test_numbers_without_an_interval_are_drawn_too(axes):
    table = evaluation().assign(low=None, high=None)
    plots.plot_checkpoints(axes, table.astype({"low": float, "high": float}), ["pass@1"])
    assert len(axes.lines[0].get_xydata()) == 2


def test_positions_leave_rare_ones_out_and_show_units(axes):
    table = pd.DataFrame({"step": [0, 0, 5], "position": [0, 1, 0], "num_tokens": [50, 3, 50],
                          "entropy": [1.0, 2.0, 0.5]})  # fmt: skip
    table = table.assign(entropy_low=table["entropy"] - 0.1, entropy_high=table["entropy"] + 0.1)
    assert plots.plot_positions(axes, table) is axes
    assert [line.get_ydata().tolist() for line in axes.lines] == [[1.0], [0.5]]
    assert axes.get_ylabel() == "entropy, nats/token"


def test_runs_with_their_mean(axes):
    steps = pd.DataFrame({"run": ["a", "a", "b"], "step": [1, 2, 1], "entropy/policy": [1.0, 2.0, 3.0]})
    assert plots.plot_runs(axes, steps, "entropy/policy") is axes
    assert [line.get_label() for line in axes.lines] == ["a", "b", "mean, 95 % over runs"]
    assert axes.lines[2].get_ydata().tolist() == [2.0, 2.0] and axes.get_ylabel() == "entropy/policy, nats/token"


def test_tokens_of_a_completion(axes):
    tokens = pd.DataFrame({"token": ["\n", "$x$"], "entropy": [0.5, 1.0]})
    assert plots.plot_tokens(axes, tokens) is axes
    assert [bar.get_height() for bar in axes.patches] == [0.5, 1.0]
    axes.figure.canvas.draw()  # "$" is no mathematics


def test_noise_scale_with_its_interval_and_where_that_has_no_end(axes):
    rows = [
        {"step": 1, "noise_scale/simple": 40.0, "noise_scale/simple_lower": 9.0, "noise_scale/num_prompts": 16},
        {"step": 2, "noise_scale/simple": 30.0, "noise_scale/simple_lower": 9.0, "noise_scale/simple_upper": 90.0,
         "noise_scale/num_prompts": 16},
    ]  # fmt: skip
    assert plots.plot_noise_scale(axes, rows) is axes
    assert [line.get_ydata().tolist() for line in axes.lines] == [[40.0, 30.0], [9.0], [16, 16]]
    assert axes.collections[0].get_paths()[0].get_extents().y1 == 90.0


BUDGET = [
    {"step": 1, "entropy_control/entropy": 0.40, "entropy_control/entropy_stderr": 0.01,
     "entropy_control/delta_optimizer": -0.03, "entropy_control/delta_predicted": -0.02},
    {"step": 2, "entropy_control/entropy": 0.37, "entropy_control/entropy_stderr": 0.01,
     "entropy_control/delta_optimizer": -0.05, "entropy_control/delta_predicted": -0.01,
     "entropy_control/realised_previous": -0.03},
]  # fmt: skip


def test_set_point_with_the_entropy_and_its_errors(axes):
    assert plots.plot_set_point(axes, BUDGET, 0.22) is axes
    assert np.allclose(axes.collections[0].get_segments()[0], [[1, 0.40 - 0.0196], [1, 0.40 + 0.0196]])
    assert axes.lines[-1].get_ydata()[0] == 0.22


def test_a_controlled_change_is_shown_at_the_step_that_made_it(axes):
    assert plots.plot_controlled_change(axes, BUDGET) is axes
    drawn = {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
    assert drawn["measured"] == [[1, -0.03]] and drawn["predicted, with correction"] == [[1, -0.02], [2, -0.01]]


def test_kernel_shows_cosines_and_parts_prompts(axes):
    names = pd.MultiIndex.from_arrays([[0, 0, 1], [5, 2, 9]], names=["prompt_index", "row"])
    kernel = pd.DataFrame([[4.0, 2.0, 0.0], [2.0, 4.0, 0.0], [0.0, 0.0, 1.0]], index=names, columns=names)
    assert plots.plot_kernel(axes, kernel) is axes
    assert np.allclose(axes.images[0].get_array(), [[1, 0.5, 0], [0.5, 1, 0], [0, 0, 1]])
    assert [line.get_ydata()[0] for line in axes.lines] == [1.5, 0.0]


def test_high_entropy_tokens_the_largest_on_top(axes):
    table = pd.DataFrame({"count": [7, 5, 9], "share_of_entropy": [0.5, 0.3, 0.1]}, index=["$a", "\x1b", "c"])
    assert plots.plot_high_entropy_tokens(axes, table, num_tokens=2) is axes
    assert [bar.get_width() for bar in axes.patches] == [0.3, 0.5]
    assert [label.get_text() for label in axes.get_yticklabels()] == [r"\x1b", r"\$a"]
    assert [text.get_text() for text in axes.texts] == [" 5", " 7"]


def test_no_token_was_drawn_often_enough(axes):
    plots.plot_high_entropy_tokens(axes, pd.DataFrame({"count": [], "share_of_entropy": []}))
    assert not axes.patches
