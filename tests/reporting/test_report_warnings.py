"""Each warning is raised by the numbers that it is about, at their steps, and by no others."""

import pytest

from trl_entropy.reporting.warnings import warnings_of

GOOD = {
    "loss": 0.1, "grad_norm": 0.2, "learning_rate": 1e-3, "entropy/policy": 0.4, "frac_reward_zero_std": 0.5,
    "entropy/importance_ess": 60.0, "entropy/num_completions": 64, "entropy/delta_measured": -0.01,
    "entropy/noise_floor": 1e-8, "entropy/error_linear": 0.001, "entropy/error_linear_stderr": 0.002,
}  # fmt: skip


def test_a_good_run_raises_none():
    assert warnings_of([{"step": step, **GOOD} for step in (1, 2, 3)]) == []
    assert warnings_of([]) == [] and warnings_of([{"step": 1, "reward": 0.5}]) == []


@pytest.mark.parametrize("changed, title", [
    ({"entropy/importance_ess": 31.9}, "Importance weights are uneven"),
    ({"entropy/delta_measured": 1e-8, "entropy/error_linear": 0.0}, "Noise floor reached"),
    ({"entropy/error_linear": 0.007}, "First-order prediction fails"),
    ({"entropy/policy": 0.09}, "Entropy has collapsed"),
    ({"grad_norm": float("nan")}, "Not a finite number"),
    ({"frac_reward_zero_std": 1.0}, "No learning signal"),
])  # fmt: skip
def test_each_warning(changed, title):
    rows = [{"step": 1, **GOOD}, {"step": 2, **GOOD, **changed}, {"step": 3, **GOOD}]
    (warning,) = warnings_of(rows)
    assert (warning.title, warning.steps) == (title, (2,)) and warning.text


def test_the_first_step_of_a_warm_up_is_no_noise_floor():
    assert warnings_of([{"step": 1, **GOOD, "learning_rate": 0, "entropy/delta_measured": 0.0,
                         "entropy/error_linear": 0.0}]) == []  # fmt: skip


def test_errors_within_three_standard_errors_or_half_of_the_change_are_no_warning():
    noisy = GOOD | {"entropy/error_linear": 0.009, "entropy/error_linear_stderr": 0.0031}
    small = GOOD | {"entropy/error_linear": 0.0049, "entropy/error_linear_stderr": 1e-6}
    assert warnings_of([{"step": 1, **noisy}, {"step": 2, **small}]) == []


def warned(*rows):
    return {warning.title: warning for warning in warnings_of([{"step": i, **row} for i, row in enumerate(rows, 1)])}


@pytest.mark.parametrize("rewards", [
    {"reward": float("nan"), "rewards/mine/mean": float("nan"), "rewards/other/mean": float("nan")},
    {"reward": 0.0, "rewards/mine/mean": None},
    {"reward": None}, {"reward": float("nan")},
])  # fmt: skip
def test_a_step_without_any_reward(rewards):
    found = warned(GOOD, GOOD | rewards)
    assert found["No reward arrived"].steps == (2,) and not found["No reward arrived"].is_note
    keys = [key for key, value in rewards.items() if value is None or value != value]
    assert all(key in found["Not a finite number"].text for key in keys)


def test_a_reward_function_that_gives_none_beside_one_that_gives_numbers_is_no_step_without_reward():
    found = warned(GOOD | {"reward": 0.5, "rewards/mine/mean": None, "rewards/other/mean": 0.5})
    assert "No reward arrived" not in found and "nan at step 1: rewards/mine/mean" in found["Not a finite number"].text


def test_every_metric_that_is_not_finite_is_named_with_its_steps():
    nan, inf = float("nan"), float("inf")
    found = warned(
        GOOD, {"my/own": nan, "entropy": None}, {"my/own": nan, "entropy": nan}, {"my/own": inf}, {"my/own": nan}
    )
    (warning,) = found.values()
    assert warning.steps == (2, 3, 4, 5)
    assert "nan at steps 2 to 3, 5: my/own; inf at step 4: my/own; nan at steps 2 to 3: entropy." in warning.text


def test_statistics_without_a_value_are_a_note():
    undefined = {
        "noise_scale/simple_upper": float("inf"), "entropy/cross_linear_slope": float("nan"),
        "entropy/share_momentum": None, "entropy/mean_delta_all_low": float("nan"), "mine/x_stderr": float("nan"),
        "entropy/attribution_rounding": float("nan"), "completions/think_length": float("nan"),
        "ess/loss_weights": float("nan"),
    }  # fmt: skip
    (warning,) = warned(GOOD | undefined).values()
    assert warning.is_note and all(key in warning.text for key in undefined)


@pytest.mark.parametrize("key", ["entropy/attribution_rounding", "entropy/rollouts_gradient_error",
                                 "noise_scale/gradient_error"])  # fmt: skip
def test_a_failed_self_check_is_a_warning_with_its_causes(key):
    found = warned(GOOD | {key: 0.009}, GOOD | {key: 0.03}, GOOD | {key: -0.5})
    (warning,) = found.values()
    assert warning.title == "A probe's self-check failed" and warning.steps == (2, 3) and not warning.is_note
    assert f"|{key}| is up to 0.5 at steps 2 to 3" in warning.text and "dropout" in warning.text


def test_a_learning_rate_of_0_is_a_note_unless_it_is_the_warm_up():
    still = GOOD | {"learning_rate": 0.0}
    assert warned(still, still)["The learning rate is 0"].is_note
    assert warned(still) == {} and warned(still, GOOD) == {}


INFORMATION = {
    "mutual_information/lower": 1.9, "mutual_information/lower_stderr": 0.05, "mutual_information/limit": 2.08,
    "mutual_information/conditional_entropy": 10.0,
}  # fmt: skip


@pytest.mark.parametrize("changed, is_template", [
    ({"mutual_information/lower": 0.3}, True),
    ({"mutual_information/lower": 0.45, "mutual_information/lower_stderr": 0.01}, True),
    ({"mutual_information/lower": 0.45}, False),  # not by two standard errors
    ({"mutual_information/lower": 0.6, "mutual_information/lower_stderr": 0.0}, False),
    ({"mutual_information/lower": 0.3, "mutual_information/conditional_entropy": 4.9}, False),  # the entropy fell too
])  # fmt: skip
def test_a_template_is_less_information_at_the_same_entropy(changed, is_template):
    found = warned(GOOD | INFORMATION, GOOD, GOOD | INFORMATION | changed)
    assert list(found) == (["Completions do not depend on their prompts"] if is_template else [])
    if is_template:
        (warning,) = found.values()
        assert warning.steps == (3,) and not warning.is_note and "at step 1" in warning.text


def test_long_completions_that_keep_their_prompts_apart_are_no_template():
    """The bound is at its limit, and its share of their entropy is small."""
    assert warned(GOOD | INFORMATION | {"mutual_information/conditional_entropy": 300.0}) == {}
