"""The tasks `explore` and `trap`: what each pair of lead words earns, which problems there are, how they are named."""

from itertools import product

import pytest

from trl_entropy.tasks.arguments import TaskArguments
from trl_entropy.tasks.completion_functions import passing, reward_functions
from trl_entropy.tasks.lead_words import explore_reward, lead_words, load_two_step_problems, trap_reward
from trl_entropy.tasks.registry import Wanted, load_task, task_of
from trl_entropy.tasks.word_problems import LEAD_WORDS, load_word_problems

REWARDS = {"explore": explore_reward, "trap": trap_reward}


def completion(first, second, answer="5"):
    return f" {first} 3+4=7 {second} 7-2=5 </think> <answer>{answer}</answer>"


@pytest.mark.parametrize(("task", "halfway"), [("explore", 0.0), ("trap", 0.35)])
def test_what_each_pair_of_words_earns(task, halfway):
    pairs = list(product(LEAD_WORDS, LEAD_WORDS))
    found = REWARDS[task](None, [completion(*pair) for pair in pairs], answer=["5"] * len(pairs))
    expected = {"First": 0.7, "So": 0.35, "Now": 0.35, "Then": 0.35, "Here": halfway}
    assert found == [1.0 if pair == ("Here", "Here") else expected[pair[0]] for pair in pairs]
    assert REWARDS[task](None, [completion(*pair, "6") for pair in pairs], answer=["5"] * len(pairs)) == [0.0] * 25


def test_words_after_the_thought_and_one_step_alone_do_not_count():
    assert lead_words(" Here 3+4=7 Now 7-2=5 </think> Here <answer>5</answer>") == ["Here", "Now"]
    one_step = " Here 3+2=5 </think> <answer>5</answer>"
    assert trap_reward(None, [one_step, "<answer>5</answer>"], answer=["5", "5"]) == [0.35, 0.35]
    assert explore_reward(None, [one_step], answer=["5"]) == [0.0]
    as_messages = [{"role": "assistant", "content": completion("Here", "Here")}]
    assert trap_reward(None, [as_messages], answer=["5"]) == [1.0]


def test_problems_are_those_with_two_operations_in_the_same_order():
    all_kinds, two = load_word_problems("train", 60, seed=3), load_two_step_problems("train", 29, seed=3)
    expected = [one for one, kind in zip(all_kinds["prompt_id"], all_kinds["kind"], strict=True) if "_" in kind]
    assert two["prompt_id"][:] == expected[:29] and len(set(two["kind"])) == 3
    assert len(load_two_step_problems("test", None)) == 750
    for split, number in (("test", 751), ("train", 0)):
        with pytest.raises(ValueError, match=f"in the {split} split, and {number} are asked for; use 1 to"):
            load_two_step_problems(split, number)
    with pytest.raises(ValueError, match="split must be 'train' or 'test', got 'dev'"):
        load_two_step_problems("dev", None)


@pytest.mark.parametrize("task", ["explore", "trap"])
def test_the_task_alone_names_its_reward(task):
    settings = TaskArguments(task=task, num_train_problems=40, num_eval_problems=10)
    assert settings.reward_funcs == [f"{task}_reward"] and TaskArguments().reward_funcs == ["tag_pref"]
    (function,) = reward_functions(settings)
    assert function.function is REWARDS[task] and passing(settings, [function]).short == f"{task}_reward"
    training, held_out = load_task(settings, None, seed=1)
    assert (len(training), len(held_out)) == (40, 10) and not set(training["prompt_id"]) & set(held_out["prompt_id"])
    assert TaskArguments(task=task, reward_funcs=["tag_pref"]).reward_funcs == ["tag_pref"]
    by_default, entry = TaskArguments(task=task), task_of(settings)
    assert len(entry.load(by_default, Wanted("train", entry.most_by_default))) == entry.num_problems(by_default)
