"""The names of `change_of`: what each stands for, and which are refused."""

import pytest

from trl_entropy.config.quantities import check_change_of, keys_of_quantities, values_asked_for


def test_names_are_the_run_s_own_quantities_and_functions():
    names = ["truncated", "entropy", "right", "metrics/words", "reward"]
    assert keys_of_quantities(names, ["right", "form"], ["words"]) == (
        "truncated",
        "rewards/right",
        "metrics/words",
        "reward",
    )
    assert keys_of_quantities(["rewards/length"], ["length"], []) == ("rewards/length",)


def test_a_function_with_the_name_of_an_own_quantity_has_its_key_alone():
    """Half of all reward functions are called `reward`."""
    assert keys_of_quantities(["entropy", "reward"], ["reward"], []) == ("reward",)
    values = {"reward": 1, "rewards/reward": 2, "rewards/right": 3, "metrics/words": 4}
    assert values_asked_for(values, None) == {"reward": 1}
    assert values_asked_for(values, ["right", "rewards/reward"]) == {"rewards/reward": 2, "rewards/right": 3}


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["rihgt"], "'rihgt', which this run does not have. It has entropy, reward, length, truncated, right"),
        (["form"], "'form', and there are several of that name. .* its key: rewards/form or metrics/form"),
        (["reward", "reward"], "names 'reward' twice"),
        ([], "name at least one of entropy, reward, length, truncated"),
    ],
)
def test_what_a_run_does_not_have_is_refused(names, message):
    with pytest.raises(ValueError, match=message):
        keys_of_quantities(names, ["right", "form"], ["words", "form"])


def test_not_set_is_the_default():
    check_change_of(None)
