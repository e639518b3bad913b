"""Metric functions: what is logged and tabulated, when, and the names that they may have."""

import math
from collections import defaultdict
from types import SimpleNamespace

import pytest

from trl_entropy.trainer.metric_functions import MetricFunctions

ROWS = [{"prompt": "a", "answer": "1"}, {"prompt": "b", "answer": "2"}, {"prompt": "c", "answer": "3"}]


def words(prompts, completions, **kwargs):
    return [len(text.split()) or None for text in completions]


def answers(prompts, completions, answer, **kwargs):
    return [float(one in text) for one, text in zip(answer, completions, strict=True)]


class Host(SimpleNamespace):
    def _log_completion_extra(self, column, values):
        self.extra[column] += values


def host(step=4, training=True, every=2):
    metrics = {"train": defaultdict(list), "eval": defaultdict(list)}
    return Host(args=SimpleNamespace(metric_every=every), state=None, model=SimpleNamespace(training=training),
                environments=None, reward_func_names=["tag_pref"], _metrics=metrics, current_step=step,
                extra=defaultdict(list))  # fmt: skip


def test_mean_and_spread_are_over_the_completions_that_have_a_value():
    trainer = host()
    MetricFunctions(trainer, [words, answers]).measure(ROWS, ["x 1", "", "x y z 0"], [[1], [], [1]])
    logged = {name: values[0] for name, values in trainer._metrics["train"].items()}
    expected = {"words/mean": 3.0, "words/std": 1.0, "answers/mean": 1 / 3, "answers/std": math.sqrt(2) / 3}
    assert logged == pytest.approx({f"metrics/{name}": value for name, value in expected.items()})
    assert trainer.extra == {"words": [2.0, None, 4.0], "answers": [1.0, 0.0, 0.0]}


def test_a_step_that_is_not_due_has_an_empty_column_and_an_evaluation_is_always_due():
    trainer = host(step=3)
    MetricFunctions(trainer, [words]).measure(ROWS, ["x"] * 3, [[1]] * 3)
    assert trainer.extra == {"words": [None] * 3} and not trainer._metrics["train"]
    trainer = host(step=3, training=False)
    MetricFunctions(trainer, [words]).measure(ROWS, ["x"] * 3, [[1]] * 3)
    assert trainer._metrics["eval"]["metrics/words/mean"] == [1.0]


def test_a_name_that_is_a_column_already_is_refused():
    def tag_pref(prompts, completions, **kwargs):
        return [0.0 for _ in completions]

    for functions in ([tag_pref], [words, words]):
        with pytest.raises(ValueError, match="is the name of another function too"):
            MetricFunctions(host(), functions)
