"""Reward functions with TRL's signature and values 0 and 1, for completions that end in `<answer>...</answer>`.

The correct ("gold") answer is in the dataset column `answer`. Several rewards are summed with `reward_weights`, as in
TRL:

    DrGRPOTrainer(..., reward_funcs=[tag_pref, format_reward])

A reward never raises or hangs, whatever a model writes: `trl_entropy.tasks.answers` limits every comparison.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any

from trl_entropy.tasks.answers import Verdict, clean_answer, shared_checker, unusable_reason

logger = logging.getLogger(__name__)

Completion = str | list[dict[str, object]]

ANSWER_OPEN, ANSWER_CLOSE = "<answer>", "</answer>"
THINK_OPEN, THINK_CLOSE = "<think>", "</think>"


def tag_pref(
    prompts: object, completions: Sequence[Completion], completion_ids: object = None, **kwargs: Any
) -> list[float]:
    """1.0 if there is exactly one `<answer>...</answer>` and it is equal to the gold answer, else 0.0.

    Numbers are compared exactly, whatever their units and currency; `3 apples and 4 pears` is not 4. Words are equal
    to the same words. Everything else is compared by math-verify.

    Args:
        prompts: Not used; part of TRL's signature.
        completions: Texts, or conversations, of which the assistant's messages are read.
        completion_ids: Not used; part of TRL's signature.
        **kwargs: The other columns of the dataset, `answer` among them, and TRL's `log_metric`.

    Returns:
        One reward for each completion. A comparison that could not be decided gives 0.0; the fractions of completions
        with such comparisons are logged: `answer_check/rejected_fraction` (answer or gold answer beyond the limits),
        `answer_check/timeout_fraction` and `answer_check/failed_fraction` (the worker died).

    Raises:
        ValueError: The dataset has no column `answer`.
    """
    return _compare([_only_answer(completion_text(completion)) for completion in completions], kwargs)


def tag_math_correct(
    prompts: object, completions: Sequence[Completion], completion_ids: object = None, **kwargs: Any
) -> list[float]:
    """1.0 if the last closed `<answer>...</answer>` is equal to the gold answer, else 0.0.

    Arguments, logged metrics and errors are the same as those of [`tag_pref`].
    """
    return _compare([extract_answer(completion) for completion in completions], kwargs)


def format_reward(
    prompts: object, completions: Sequence[Completion], completion_ids: object = None, **kwargs: Any
) -> list[float]:
    """1.0 if the completion has the format that the prompt asks for, correct or not ([`is_well_formed`]), else 0.0."""
    return [float(is_well_formed(completion)) for completion in completions]


def completion_text(completion: Completion) -> str:
    """The text of a completion; for a conversation, the text of the assistant's messages."""
    if isinstance(completion, str):
        return completion
    contents = (message.get("content") for message in completion if message.get("role", "assistant") == "assistant")
    return "".join(_content_text(content) for content in contents)


def extract_answer(completion: Completion) -> str | None:
    """The content of the last closed answer tag; `None` if there is none."""
    text = completion_text(completion)
    start = text.rfind(ANSWER_OPEN, 0, max(text.rfind(ANSWER_CLOSE), 0))
    return None if start < 0 else text[start + len(ANSWER_OPEN) : text.find(ANSWER_CLOSE, start)]


def is_well_formed(completion: Completion) -> bool:
    """Whether a completion has the form `thoughts</think> <answer>...</answer>`, each tag once, and ends after it.

    The prompt ends with `<think>`, so the completion must not open it again.
    """
    thoughts, closed, rest = completion_text(completion).partition(THINK_CLOSE)
    rest = rest.strip()
    if not closed or not rest.startswith(ANSWER_OPEN) or not rest.endswith(ANSWER_CLOSE):
        return False
    inner = rest[len(ANSWER_OPEN) : -len(ANSWER_CLOSE)]
    return not any(tag in thoughts or tag in inner for tag in (THINK_OPEN, THINK_CLOSE, ANSWER_OPEN, ANSWER_CLOSE))


def think_length(completion: Completion) -> int:
    """The number of characters before the first `</think>`; of all characters if there is none."""
    return len(completion_text(completion).partition(THINK_CLOSE)[0])


def answer_verdicts(golds: Sequence[object], answers: Sequence[str | None]) -> list[Verdict]:
    """The verdict on each extracted answer; a missing answer (`None`) is different from every gold answer."""
    pairs = [(gold, answer) for gold, answer in zip(golds, answers, strict=True) if answer is not None]
    verdicts = iter(shared_checker().check(pairs))
    return [Verdict.DIFFERENT if answer is None else next(verdicts) for answer in answers]


def _only_answer(text: str) -> str | None:
    if text.count(ANSWER_OPEN) != 1 or text.count(ANSWER_CLOSE) != 1:
        return None
    return extract_answer(text)


def _content_text(content: object) -> str:
    if isinstance(content, list):  # parts of a multimodal message
        return "".join(part.get("text") or "" for part in content if isinstance(part, dict))
    return content if isinstance(content, str) else ""


def _compare(answers: list[str | None], kwargs: dict[str, Any]) -> list[float]:
    """The rewards of the extracted answers; a missing answer (`None`) gets 0.0."""
    golds = kwargs.get("answer")
    if golds is None:
        raise ValueError(
            "this reward compares with the gold answer in the dataset column `answer`, but the dataset has no such "
            f"column: the reward got {sorted(kwargs)}. Rename yours, `dataset.rename_column('solution', 'answer')`, "
            "and keep `remove_unused_columns=False`."
        )
    for gold in golds:
        _warn_of_unusable(clean_answer(gold))
    verdicts = answer_verdicts(golds, answers)
    _log_fractions(verdicts, kwargs.get("log_metric"))
    return [float(verdict is Verdict.EQUAL) for verdict in verdicts]


def _log_fractions(verdicts: list[Verdict], log_metric: Callable[[str, float], None] | None) -> None:
    # TRL averages logged values over calls and ranks; the mean of fractions is a fraction.
    if log_metric is None or not verdicts:
        return
    for kind in (Verdict.REJECTED, Verdict.TIMEOUT, Verdict.FAILED):
        log_metric(f"answer_check/{kind.value}_fraction", verdicts.count(kind) / len(verdicts))


@functools.lru_cache(maxsize=10_000)
def _warn_of_unusable(gold: str) -> None:
    """Warn once if no completion can earn the reward of this gold answer, or only one that repeats it literally."""
    if not gold:
        logger.warning("a gold answer is empty: no completion of its prompt can earn the reward")
    elif reason := unusable_reason(gold):
        logger.warning(
            "the gold answer %.80r is beyond the limits of trl_entropy.tasks.answers (%s): only a completion that "
            "repeats it literally earns the reward",
            gold,
            reason,
        )
