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
