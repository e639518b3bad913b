"""Two tasks with a worse way that is found first: `explore` and `trap`, the word problems with two operations.

The embedded model begins each step of a solution with one of five words, and after its warm start all five are about
equally likely. What a right answer earns depends on these words: 1 if both steps begin with "Here", 0.7 if the first
begins with "First", 0.35 otherwise. So "First" pays at once, and "Here" only once a second "Here" has become likely: a
policy that commits to the first good way ends at 0.7. A first "Here" without a second one earns

- 0 in `explore`, where the way to 1 leads through completions that earn nothing;
- 0.35 in `trap`, where it costs only what "First" would have earned.

A completion passes if it earns 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from trl_entropy.tasks import rewards
from trl_entropy.tasks.word_problems import KINDS, MAX_PROBLEMS, load_word_problems

if TYPE_CHECKING:
    from datasets import Dataset

BEST, AT_ONCE = "Here", "First"
WORTH_AT_ONCE, WORTH_OTHERWISE = 0.7, 0.35
# What a right answer earns whose first step alone begins with `BEST`.
WORTH_HALFWAY = {"explore": 0.0, "trap": WORTH_OTHERWISE}


def lead_words(completion: rewards.Completion) -> list[str]:
    """The words that begin the steps of a solution: `First` and `So` of `First 3+4=7 So 7-2=5`."""
    thought = rewards.completion_text(completion).partition(rewards.THINK_CLOSE)[0]
    return [word for word in thought.split() if word.isalpha()]


def worth(words: Sequence[str], task: str) -> float:
    """What a right answer earns whose steps begin with these words; `task` is `"explore"` or `"trap"`."""
    if list(words[:2]) == [BEST, BEST]:
        return 1.0
    first = words[0] if words else ""
    return {AT_ONCE: WORTH_AT_ONCE, BEST: WORTH_HALFWAY[task]}.get(first, WORTH_OTHERWISE)


def explore_reward(
    prompts: object, completions: Sequence[rewards.Completion], completion_ids: object = None, **kwargs: Any
) -> list[float]:
    """The reward of the task `explore`: 0 for a wrong answer, and 0, 0.35, 0.7 or 1 for a right one.

    Arguments, logged metrics and errors are those of [`tag_pref`], which says what is right.
    """
    return _paid("explore", prompts, completions, kwargs)


def trap_reward(
    prompts: object, completions: Sequence[rewards.Completion], completion_ids: object = None, **kwargs: Any
) -> list[float]:
    """The reward of the task `trap`: 0 for a wrong answer, and 0.35, 0.7 or 1 for a right one.

    Arguments, logged metrics and errors are those of [`tag_pref`], which says what is right.
    """
    return _paid("trap", prompts, completions, kwargs)


def _paid(
    task: str, prompts: object, completions: Sequence[rewards.Completion], kwargs: dict[str, Any]
) -> list[float]:
    right = rewards.tag_pref(prompts, completions, **kwargs)
    return [one * worth(lead_words(text), task) for one, text in zip(right, completions, strict=True)]


def load_two_step_problems(split: str, num_problems: int | None, seed: int = 0) -> Dataset:
    """The first problems with two operations among those that [`load_word_problems`] draws; None: all that there are.

    Raises:
        ValueError: for an unknown split, or more problems than there are: 3,750 of `"train"`, 750 of `"test"`.
    """
    most = MAX_PROBLEMS.get(split, 2) // 2  # the kinds take turns, and half of them have two operations
    if num_problems is not None and not 0 < num_problems <= most:
        raise ValueError(
            f"there are {most} problems with two operations in the {split} split, and {num_problems} are asked for; "
            f"use 1 to {most}."
        )
    drawn = 2 * (num_problems or most) + 3
    problems = load_word_problems(split, min(drawn, MAX_PROBLEMS.get(split, drawn)), seed)
    two = {name for name, kind in KINDS.items() if len(kind.operators) == 2}
    return problems.select([row for row, kind in enumerate(problems["kind"]) if kind in two][:num_problems])
