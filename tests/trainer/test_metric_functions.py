"""Metric functions: what is logged and tabulated, when, and the names that they may have."""

import math
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset

from trl_entropy.probes import Probe
from trl_entropy.runs.directory import RunDirectory
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
    args, model = SimpleNamespace(metric_every=every, device="cpu"), SimpleNamespace(training=training)
    return Host(args=args, state=None, model=model,
                environments=None, reward_func_names=["tag_pref"], _metrics=metrics, current_step=step,
                extra=defaultdict(list), tools=[], rollout_func=None, num_generations=1, num_generations_eval=1,
                _tokenizer=None)  # fmt: skip


def test_mean_and_spread_are_over_the_completions_that_have_a_value():
    trainer = host()
    MetricFunctions(trainer, [words, answers]).measure(ROWS, ["x 1", "", "x y z 0"], [[1], [], [1]])
    logged = {name: values[0] for name, values in trainer._metrics["train"].items()}
    expected = {"words/mean": 3.0, "words/std": 1.0, "answers/mean": 1 / 3, "answers/std": math.sqrt(2) / 3}
    expected |= {"words/mean_stderr": 1.0, "answers/mean_stderr": 1 / 3}  # of 2 and of 3 prompts
    assert logged == pytest.approx({f"metrics/{name}": value for name, value in expected.items()})
    assert trainer.extra == {"words": [2.0, None, 4.0], "answers": [1.0, 0.0, 0.0]}


def test_a_step_that_is_not_due_has_an_empty_column_and_an_evaluation_is_always_due():
    trainer = host(step=3)
    MetricFunctions(trainer, [words]).measure(ROWS, ["x"] * 3, [[1]] * 3)
    assert trainer.extra == {"words": [None] * 3} and not trainer._metrics["train"]
    trainer = host(step=3, training=False)
    MetricFunctions(trainer, [words]).measure(ROWS, ["x"] * 3, [[1]] * 3)
    assert trainer._metrics["eval"]["metrics/words/mean"] == [1.0]


class Read(Probe):
    """Keeps each step's E, with its values."""

    def __init__(self):
        super().__init__()
        self.seen = {}

    def on_rollouts_drawn(self, args, state, control, *, metrics, record, **kwargs):
        if record is not None and record.probe_batch is not None:
            self.seen[record.step] = record.probe_batch.completions

    on_no_more_rollouts = on_rollouts_drawn


def share_of_a(prompts, completions, letter, **kwargs):
    return [text.count(one) / len(text) if text else None for one, text in zip(letter, completions, strict=True)]


@pytest.mark.parametrize("source", ["held_out", "next_rollouts"])
def test_metrics_of_the_probes_completions_are_logged_with_the_step(make_trainer, tokenizer, source):
    read = Read()
    trainer = make_trainer(
        callbacks=[read], max_steps=2, entropy_probe=True, entropy_probe_completions=source, metric_funcs=[share_of_a],
        entropy_probe_num_completions=8, per_device_train_batch_size=8,
        dataset=Dataset.from_list([{"prompt": f"Ann has {i} apples.", "letter": "ae"[i % 2]} for i in range(12)]),
    )  # fmt: skip
    trainer.train()
    rows = {row["step"]: row for row in RunDirectory(trainer.args.output_dir).metrics()}
    assert read.seen.keys() == rows.keys() == {1, 2}
    for step, completions in read.seen.items():
        letters = ["ae"[int(text.split()[2]) % 2] for text in tokenizer.batch_decode(
            completions.input_ids[:, : completions.prompt_columns], skip_special_tokens=True)]  # fmt: skip
        ids = completions.input_ids[:, completions.prompt_columns :]
        texts = [tokenizer.decode(row[mask.bool()], skip_special_tokens=True)
                 for row, mask in zip(ids, completions.completion_mask, strict=True)]  # fmt: skip
        values = torch.tensor(share_of_a(None, texts, letters), dtype=torch.float64)
        torch.testing.assert_close(completions.values["metrics/share_of_a"], values)
        logged = {name.removeprefix("metrics/share_of_a/"): value for name, value in rows[step].items()
                  if name.startswith("metrics/")}  # fmt: skip
        assert logged["probe_mean"] == pytest.approx(values.mean().item())
        assert logged["probe_std"] == pytest.approx(values.std(correction=0).item())
        assert {"mean", "std", "mean_stderr"} <= logged.keys()
        if source == "held_out" or step == 2:  # one completion of each prompt
            assert logged["probe_mean_stderr"] == pytest.approx(values.std().item() / len(values) ** 0.5)


def test_a_name_that_is_a_column_already_is_refused():
    def tag_pref(prompts, completions, **kwargs):
        return [0.0 for _ in completions]

    for functions in ([tag_pref], [words, words]):
        with pytest.raises(ValueError, match="is the name of another function too"):
            MetricFunctions(host(), functions)
