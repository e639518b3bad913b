"""Reward and metric functions: by name, with settings, tried on made-up completions; who says what passes."""

import math
from pathlib import Path

import pytest

from trl_entropy.tasks.arguments import TaskArguments
from trl_entropy.tasks.completion_functions import (
    metric_functions,
    passing,
    planned_functions,
    reward_functions,
    training_files,
    tried,
)

FILE = Path(__file__).with_name("own_functions.py")
ROWS = [{"prompt": "2 + 2?", "answer": "4", "prompt_id": "a"}, {"prompt": "3 + 2?", "answer": "5", "prompt_id": "b"}]


def of(*names, **settings):
    return TaskArguments(reward_funcs=[f"{FILE}:{name[1:]}" if name[0] == ":" else name for name in names], **settings)


def test_names_of_this_package_of_trl_of_a_file_and_of_a_model():
    task = of("tag_pref", "think_format_reward", ":brevity", "owner/judge", reward_kwargs={"brevity": {"most": 2}})
    found = reward_functions(task)
    assert [one.short for one in found] == ["tag_pref", "think_format_reward", "brevity", "judge"]
    assert [one.is_model for one in found] == [False, False, False, True] and found[3].function == "owner/judge"
    assert found[2](ROWS, ["one", "one two"], [[1], [1, 2]]) == [0.5, 0.0]
    planned = planned_functions(task)
    assert planned["reward_funcs"] == ["tag_pref", "think_format_reward", "brevity", "judge"]
    assert list(planned["function_files"]) == ["own_functions.py"]


def test_a_factory_of_trl_takes_its_settings():
    task = of(
        "get_soft_overlong_punishment",
        reward_kwargs={"get_soft_overlong_punishment": {"max_completion_len": 4, "soft_punish_cache": 2}},
    )
    (one,) = reward_functions(task)
    assert one(ROWS, ["", ""], [[1], [1, 2, 3, 4]]) == [0, -1]


def test_a_function_gets_the_columns_may_be_awaited_and_may_give_none():
    same, slowly, none = reward_functions(of(":same_answer", ":slowly", ":some_none"))
    assert same(ROWS, ["4", "4"], [[1], [1]]) == [1.0, 0.0]
    assert slowly(ROWS, ["4", "4"], [[1], [1]]) == [0.5, 0.5]
    first, second = none(ROWS, ["4", "4"], [[1], [1]])
    assert math.isnan(first) and second == 1.0


def test_trials_say_what_a_function_gives_for_a_right_answer():
    rows = [*ROWS, {"prompt": "1 + 1?", "answer": "2", "prompt_id": "c"}]
    trial, other = tried(reward_functions(of("tag_pref", ":Judge")), rows)
    assert trial.values == [0.0, 0.0, 1.0] and other.values == [1.0] * 3 and trial.seconds > 0


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("too_few", "reward function too_few must return a list of 2 numbers, one a completion; it returned 1"),
        ("words", "reward function words must return numbers; it returned 'good' for the completion ''"),
        (
            "raising",
            f"reward function raising, {FILE}, line 31: ZeroDivisionError: division by zero, for the completion ''",
        ),
    ],
)
def test_a_function_that_does_not_work_is_named_in_one_line(name, said):
    with pytest.raises(ValueError, match=name) as refused:
        tried(reward_functions(of(f":{name}")), ROWS)
    assert said in str(refused.value) and "\n" not in str(refused.value)


def test_a_function_that_asks_for_another_name_is_told_what_it_is_given():
    with pytest.raises(ValueError, match=r"argument: 'solution'\. It is given answer, ") as refused:
        tried(reward_functions(of(":another_name")), ROWS)
    assert "for the completion" not in str(refused.value)


@pytest.mark.parametrize(
    ("names", "settings", "said"),
    [
        ([], {}, "reward_funcs is empty"),
        ([":brevity", ":brevity"], {}, "'brevity' is the name of two functions"),
        (["tag_pref"], {"reward_kwargs": {"tag_perf": {}}}, "reward_kwargs: 'tag_perf' is none of reward_funcs"),
        ([":brevity"], {"reward_kwargs": {"brevity": 3}}, "reward_kwargs: brevity has 3; names of settings"),
    ],
)
def test_settings_that_do_not_fit_are_refused(names, settings, said):
    with pytest.raises(ValueError, match="reward_") as refused:
        reward_functions(of(*names, **settings))
    assert said in str(refused.value)


def test_the_first_function_but_the_format_says_what_passes():
    assert (
        passing(of("format_reward", "tag_pref"), reward_functions(of("format_reward", "tag_pref"))).short == "tag_pref"
    )
    task = of("tag_pref", ":brevity", pass_reward="brevity")
    assert passing(task, reward_functions(task)).short == "brevity"
    for task in (of("owner/judge"), of("tag_pref", pass_reward="brevity")):
        with pytest.raises(ValueError, match="pass_reward"):
            passing(task, reward_functions(task))


def test_metric_functions_are_no_part_of_what_a_resumed_run_must_share():
    task = of("tag_pref", metric_funcs=[f"{FILE}:brevity"], metric_kwargs={"brevity": {"most": 1}})
    (one,) = metric_functions(task)
    assert one.kind == "metric" and one(ROWS, ["", "a b"], [[], []]) == [1.0, -1.0]
    assert training_files(task) == {} == planned_functions(task)["function_files"]
    assert task.own_functions() == {f"{FILE}:brevity": "metric_funcs"}
    with pytest.raises(ValueError, match="metric function raising"):
        tried(metric_functions(of("tag_pref", metric_funcs=[f"{FILE}:raising"])), ROWS)
