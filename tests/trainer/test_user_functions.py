"""What a function of the user's own raises while training is one line, and what was logged before it stays."""

import functools
import logging

import pandas as pd
import pytest
from datasets import Dataset

from trl_entropy import DrGRPOConfig, DrGRPOTrainer
from trl_entropy.models.embedded import build_model
from trl_entropy.models.embedded_agent import build_agent_tokenizer
from trl_entropy.runs.directory import RunDirectory

HERE = __file__
TEXTS = ["a good one", "the bad one", "the last bad one"]


def needs_good(completions, bonus=0.0, **kwargs):
    return [bonus + [1.0][text.count("bad")] for text in completions]


async def awaited(completions, **kwargs):
    return needs_good(completions)


class Scorer:
    __name__ = "scorer"

    def __call__(self, completions, **kwargs):
        return needs_good(completions)


def decorated(function):
    @functools.wraps(function)
    def called(**kwargs):
        return function(**kwargs)

    return called


def with_bonus(completions, **kwargs):
    return needs_good(completions, bonus=1.0)


def words(completions, **kwargs):
    return ["no number" if "bad" in text else 1.0 for text in completions]


def too_few(completions, **kwargs):
    return [1.0]


def nothing(completions, **kwargs):
    return None


def leaving(completions, **kwargs):
    raise SystemExit("enough")


RAISES = (
    r"reward function {name}, {file}, line \d+: IndexError: list index out of range, for the completion 'the bad one'"
)
KINDS = {
    "function": (needs_good, RAISES),
    "coroutine": (awaited, RAISES),
    "object": (Scorer(), RAISES),
    "decorated": (decorated(needs_good), RAISES),
    "partial": (functools.partial(needs_good, bonus=1.0), RAISES),
    "calls another": (with_bonus, RAISES),
    "no number": (words, "reward function {name} must return numbers; it returned 'no number' for .* 'the bad one'"),
    "too few": (too_few, "must return a list of 3 numbers, one a completion; it returned 1 of them"),
    "nothing": (nothing, "must return a list of 3 numbers, one a completion; it returned None"),
    "leaves": (leaving, "reward function leaving, .* SystemExit: enough, for the completion 'a good one'"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_reward_function_that_fails_is_named_with_its_line_and_the_completion(make_trainer, kind):
    function, said = KINDS[kind]
    trainer = make_trainer(reward_funcs=[function])
    rows, ids = [{"prompt": "Ann", "environment": 1}] * 3, [[1], [2], [3]]
    with pytest.raises(ValueError, match=said.format(name=trainer.reward_func_names[0], file=HERE)) as failed:
        trainer._calculate_rewards(rows, ["Ann"] * 3, TEXTS, ids)
    assert "\n" not in str(failed.value)
    assert trainer.reward_funcs == [function]


def test_what_trl_takes_is_taken(make_trainer):
    import torch

    trainer = make_trainer(reward_funcs=[lambda completions, **_: torch.ones(2), lambda completions, **_: (None, 2)])
    found = trainer._calculate_rewards([{"prompt": "Ann"}] * 2, ["Ann"] * 2, ["a", "b"], [[1], [2]])
    assert found[:, 0].tolist() == [1, 1] and found[1, 1] == 2 and found[0, 1].isnan()


@pytest.mark.parametrize("kind", ["reward", "metric"])
def test_nothing_that_was_logged_is_lost(make_trainer, kind, monkeypatch):
    calls = []

    def third(completions, **kwargs):
        calls.append(len(completions))
        return [1 / 0 if len(calls) > 2 else 1.0 for _ in completions]

    functions = {"reward_funcs": [third]} if kind == "reward" else {"metric_funcs": [third]}
    trainer = make_trainer(**functions, max_steps=4, report_to="tensorboard", log_completions=True,
                           num_completions_to_print=0, logging_steps=1, disable_tqdm=False)  # fmt: skip
    with pytest.raises(ValueError, match=rf"{kind} function third, .*, line \d+: ZeroDivisionError") as failed:
        trainer.train()
    assert "for the completion '" in str(failed.value) and isinstance(failed.value.__cause__, ZeroDivisionError)
    run = RunDirectory(trainer.args.output_dir)
    assert [row["step"] for row in run.metrics()] == [1, 2]
    tables = [pd.read_parquet(path) for path in sorted((run.path / "completions").glob("*.parquet"))]
    assert [table["step"].iloc[0] for table in tables] == [1, 2] and "third" in tables[0]
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run.tensorboard_path))
    events.Reload()
    assert [one.step for one in events.Scalars("train/reward")] == [1, 2]
    bars = [c for c in trainer.callback_handler.callbacks if hasattr(c, "training_bar")]
    assert [bar.training_bar for bar in bars] == [None], "so that nothing is printed after the error"


class Desk:
    """An environment of which one part fails, that which `broken` names."""

    broken = ""

    def __init__(self):
        self._fail("__init__")

    def _fail(self, part):
        if self.broken == part:
            raise KeyError(part)

    def reset(self, level, **row):
        self._fail("reset")

    def ring(self) -> str:
        """Rings."""
        if self.broken == "ring":
            raise SystemExit("rung")
        return "?"

    def get_reward(self):
        self._fail("get_reward")
        return 1.0


def make_desk():
    Desk.broken = ""
    desk, Desk.broken = Desk(), "factory"
    desk._fail("factory")


@pytest.fixture(scope="module")
def agent(tmp_path_factory):
    path, tokenizer = tmp_path_factory.mktemp("agent"), build_agent_tokenizer()
    build_model(tokenizer, seed=0).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


BROKEN = {
    "__init__": "environment Desk.__init__, {file}, line \\d+: KeyError: '__init__'$",
    "reset": "environment Desk.reset, {file}, line \\d+: KeyError: 'reset', called with level=3, prompt=",
    "ring": "environment Desk.ring, {file}, line \\d+: SystemExit: rung",
    "get_reward": "reward function Desk, {file}, line \\d+: KeyError: 'get_reward', for the completion",
    "factory": "environment_factory make_desk, {file}, line \\d+: KeyError: 'factory'",
}


@pytest.mark.parametrize("part", BROKEN)
def test_an_environment_that_fails_is_named_with_its_line_and_what_it_was_given(agent, tmp_path, monkeypatch, part):
    monkeypatch.setattr(Desk, "broken", part if part in ("__init__",) else "")
    rows = Dataset.from_list([{"prompt": [{"role": "user", "content": "Ann"}], "level": 3}] * 2)
    args = DrGRPOConfig(str(tmp_path), use_cpu=True, bf16=False, max_completion_length=24, num_generations=2,
                        per_device_train_batch_size=2)  # fmt: skip
    factory = make_desk if part == "factory" else Desk
    with pytest.raises(ValueError, match=BROKEN[part].format(file=HERE)) as failed:
        trainer = DrGRPOTrainer(agent, None, args, train_dataset=rows, environment_factory=factory)
        monkeypatch.setattr(Desk, "broken", part)
        if part == "ring":
            ids = trainer._tokenizer('<tool_call>{"name": "ring", "arguments": {}}</tool_call><|endoftext|>')
            turn = lambda prompts, *_, **__: ([list(ids["input_ids"]) for _ in prompts], None)  # noqa: E731
            monkeypatch.setattr(trainer, "_generate_single_turn", turn)
        trainer._generate_and_score_completions([dict(row) for row in rows])
    assert "\n" not in str(failed.value)


def test_an_exception_of_nobodys_function_stays_as_it_is(make_trainer, monkeypatch, caplog):
    trainer = make_trainer()
    monkeypatch.setattr(trainer, "_generate", lambda prompts: {}["of torch"])
    with caplog.at_level(logging.ERROR), pytest.raises(KeyError, match="of torch"):
        trainer._generate_and_score_completions([{"prompt": "Ann"}] * 4)
