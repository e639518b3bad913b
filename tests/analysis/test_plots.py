"""Figures take and return axes, and draw the numbers that they are given."""

from pathlib import Path

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
     "entropy_control/num_prompts": 4,
     "entropy_control/delta_optimizer": -0.03, "entropy_control/delta_predicted": -0.02},
    {"step": 2, "entropy_control/entropy": 0.37, "entropy_control/entropy_stderr": 0.01,
     "entropy_control/num_prompts": 4,
     "entropy_control/delta_optimizer": -0.05, "entropy_control/delta_predicted": -0.01,
     "entropy_control/realised_previous": -0.03},
]  # fmt: skip


def test_set_point_with_the_entropy_and_its_errors(axes):
    assert plots.plot_set_point(axes, BUDGET, 0.22) is axes
    assert np.allclose(axes.collections[0].get_segments()[0], [[1, 0.40 - 0.031824], [1, 0.40 + 0.031824]])
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


CHANGES = [
    {"step": step, "entropy/delta_measured": 0.5, "entropy/delta_measured_stderr": 0.01, "entropy/delta_linear": 0.4,
     "entropy/half_a_linear": 0.4, "entropy/half_a_linear_stderr": 0.01, "entropy/half_b_measured": 0.5,
     "entropy/half_b_measured_stderr": 0.02, "entropy/num_prompts": 5, "entropy/half_a_num_prompts": 3,
     "entropy/half_b_num_prompts": 2}
    for step in (1, 2)
]  # fmt: skip
# Student's t at 97.5 % for 1, 2, 3 and 4 degrees of freedom, from a printed table.
T = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776}


def half_lengths(axes):
    """Of the error bars of the first point, in the order in which they were drawn."""
    first = [collection.get_segments()[0] for collection in axes.collections if len(collection.get_segments())]
    return [np.ptp(segment, axis=0).max() / 2 for segment in first]


def test_intervals_of_95_percent_have_the_degrees_of_freedom_of_their_prompts(axes):
    plots.plot_entropy_change(axes, CHANGES)
    assert half_lengths(axes) == pytest.approx([0.01 * T[4]], rel=1e-3)
    axes.clear()
    plots.plot_prediction(axes, CHANGES, "second_order")
    assert sorted(half_lengths(axes)) == pytest.approx([0.01 * T[2], 0.02 * T[1]], rel=1e-3)
    axes.clear()
    slope = {"step": 1, "fisher/change_slope": 1.1, "fisher/change_slope_stderr": 0.1, "fisher/num_prompts": 4}
    plots.plot_change_slope(axes, [slope])
    assert half_lengths(axes) == pytest.approx([0.1 * T[3]], rel=1e-3)
    axes.clear()
    plots.plot_integral(axes, {"steps": [1], "fresh": [1.0], "fresh_stderr": [0.1], "fresh_num_prompts": [2]})
    assert half_lengths(axes) == pytest.approx([0.1 * T[1]], rel=1e-3)
    assert axes.get_legend_handles_labels()[1] == ["fresh completions, 95 %"]


def test_bars_without_known_degrees_of_freedom_are_standard_errors_and_are_called_so(axes):
    plots.plot_entropy_change(axes, [{**CHANGES[0], "entropy/num_prompts": None}, CHANGES[1]])
    assert half_lengths(axes) == pytest.approx([0.01])
    assert "measured, standard error" in axes.get_legend_handles_labels()[1]


def test_no_function_names_a_normal_quantile_95_percent():
    package = Path(plots.__file__).parents[2]
    assert not [path.name for path in package.rglob("*.py") if "1.96" in path.read_text()]


def test_runs_of_different_settings_have_no_mean_and_say_in_what_they_differ(axes):
    steps = pd.DataFrame({"run": ["a", "a", "b", "b"], "step": [1, 2, 1, 2], "reward": [0.1, 0.2, 0.4, 0.6],
                          "settings": ["learning_rate 0.1"] * 2 + ["learning_rate 0.2"] * 2})  # fmt: skip
    plots.plot_runs(axes, steps, "reward")
    assert [line.get_label() for line in axes.lines] == ["a, learning_rate 0.1", "b, learning_rate 0.2"]
    assert not axes.collections


def test_the_axis_fits_the_runs_whatever_their_interval(axes):
    """Two runs: t = 12.7, an interval of some 13 times their distance on either side."""
    steps = pd.DataFrame({"run": ["a", "a", "b", "b"], "step": [1, 2, 1, 2], "reward": [0.1, 0.2, 0.4, 0.6]})
    plots.plot_runs(axes, steps, "reward")
    axes.figure.canvas.draw()
    assert axes.get_ylim() == pytest.approx((0.1 - 0.025, 0.6 + 0.025)) and len(axes.collections) == 1


def parts(**columns):
    table = pd.DataFrame({"change": [-0.002, 0.001], "change_low": [-0.003, -0.001], "change_high": [-0.001, 0.003],
                          "share": [2.0, -1.0], "low": [1.0, -3.0], "high": [4.0, 0.5], "token_share": [0.25, 0.75]},
                         index=["above_mean_rare", "incorrect"])  # fmt: skip
    return table.assign(**columns)


def test_parts_are_drawn_in_nats_per_token_with_their_intervals(axes):
    plots.plot_shares(axes, parts(), "outcome")
    assert [bar.get_width() for bar in axes.patches] == [-0.002, 0.001]
    assert np.allclose([segment[:, 0] for segment in axes.collections[0].get_segments()],
                       [[-0.003, -0.001], [-0.001, 0.003]])  # fmt: skip
    alike = next(line for line in axes.lines if line.get_label() == "if all tokens were alike")
    assert alike.get_xdata() == pytest.approx([-0.00025, -0.00075])
    assert [text.get_text().strip() for text in axes.texts] == ["200%", "-100%"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["above the group's mean, rare", "incorrect"]


def test_without_shares_the_parts_are_drawn_alone(axes):
    plots.plot_shares(axes, parts(share=np.nan, low=np.nan, high=np.nan))
    assert not axes.texts and "no shares" in axes.get_xlabel() and len(axes.patches) == 2
    assert np.isfinite(axes.get_xlim()).all() and max(map(abs, axes.get_xlim())) < 0.005


EMPTY = pd.DataFrame()


@pytest.mark.parametrize("draw, remedy", [
    (lambda axes: plots.plot_reward(axes, [{"step": 1, "reward": None}]), "reward"),
    (lambda axes: plots.plot_pass_at_1(axes, []), "held-out"),
    (lambda axes: plots.plot_entropy(axes, [{"step": 1}], []), "entropy"),
    (lambda axes: plots.plot_entropy_change(axes, [{"step": 1}]), "entropy_probe: true"),
    (lambda axes: plots.plot_prediction(axes, [{"step": 1, "entropy/half_b_measured": 1.0}], "linear"), "Train with"),
    (lambda axes: plots.plot_noise_scale(axes, [], "adam"), "noise_scale_probe: true"),
    (lambda axes: plots.plot_set_point(axes, []), "entropy_control: hold"),
    (lambda axes: plots.plot_controlled_change(axes, []), "entropy_control: hold"),
    (lambda axes: plots.plot_kernel(axes, EMPTY), "fisher_probe: true"),
    (lambda axes: plots.plot_checkpoints(axes, evaluation(), ["greedy_accuracy"]), "greedy_accuracy"),
    (lambda axes: plots.plot_positions(axes, EMPTY), "trl-entropy evaluate"),
    (lambda axes: plots.plot_tokens(axes, EMPTY), "no completion"),
    (lambda axes: plots.plot_shares(axes, EMPTY), "entropy_attribution: token"),
    (lambda axes: plots.plot_runs(axes, pd.DataFrame({"run": ["a"], "step": [1]}), "reward"), "reward"),
])  # fmt: skip
def test_axes_without_data_say_what_is_missing(axes, draw, remedy):
    assert draw(axes) is axes
    (sentence,) = (text.get_text().replace("\n", " ") for text in axes.texts)
    assert remedy in sentence and sentence.endswith(".")


@pytest.mark.parametrize(("number", "points", "legend"), [
    (400, 400, "measured, standard error"), (401, 201, "measured, standard error, 1 of 2 steps"),
    (10_000, 400, "measured, standard error, 1 of 25 steps"),
])  # fmt: skip
def test_a_long_run_shows_as_many_intervals_as_can_be_told_apart(axes, number, points, legend):
    rows = [
        {"step": step, "entropy/delta_measured": step / 1e3, "entropy/delta_measured_stderr": 1e-3}
        for step in range(1, number + 1)
    ]
    plots.plot_entropy_change(axes, rows)
    (drawn,) = axes.containers
    steps = drawn.lines[0].get_xdata()
    assert len(steps) == points and steps[-1] == number and drawn.get_label() == legend
