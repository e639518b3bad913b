"""Run with `pytest` in this folder."""

from task import last_number, problems, right


def test_no_problem_is_both_trained_and_evaluated_on():
    train, test = ({row["prompt"] for row in problems(split)} for split in ("train", "test"))
    assert train and test and not train & test


def test_the_reward_is_for_the_right_answer_alone():
    given = right(["2 + 3?"] * 3, ["so it is 5", "it is 6", ""], answer=["5"] * 3)
    assert given == [1.0, 0.0, 0.0]


def test_the_last_number_counts():
    assert last_number("3 and then 4.") == "4" and last_number("none") is None
