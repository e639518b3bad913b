"""Evaluation of agents: episodes with tools and environments, of policies whose every turn is known."""

import argparse
import json
from dataclasses import replace

import pandas as pd
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import GenerationMixin

from trl_entropy.evaluate import _settings, parse
from trl_entropy.evaluation import worker
from trl_entropy.evaluation.plan import PROFILES, Job, Target, check_functions, settings_of
from trl_entropy.evaluation.problems import held_out_problems
from trl_entropy.models.embedded import build_model
from trl_entropy.models.embedded_agent import build_agent_tokenizer
from trl_entropy.runs.strict_json import Row
from trl_entropy.tasks.calculator import CalculatorProblem, calculate
from trl_entropy.tasks.prompts import rendered

PROBLEMS = [
    CalculatorProblem("add", "Ana", "apples", (37, 58)),
    CalculatorProblem("subtract", "Ben", "coins", (64, 12)),
    CalculatorProblem("multiply", "Cleo", "pens", (7, 31)),
]
END = "<|endoftext|>"
AGENTS = '''
def double(expression: str) -> str:
    """
    Says the wrong result, and has an answer of its own.

    Args:
        expression: A sum.
    """
    return "<answer>" + right(expression) + "</answer>"


async def calculate(expression: str) -> str:
    """
    Calculates.

    Args:
        expression: A sum.
    """
    return right(expression)


def right(expression):
    from trl_entropy.tasks.calculator import calculate
    return calculate(expression)


class Desk:
    """Gives 1 for the right sum, whatever the policy answers."""

    def reset(self, answer, **row):
        self.answer, self.found = answer, None
        return " Well?"

    def calculate(self, expression: str) -> str:
        """
        Calculates.

        Args:
            expression: A sum.
        """
        self.found = right(expression)
        return self.found

    def get_reward(self) -> float:
        return float(self.found == self.answer)


def hinted(prompts, completions, environments=None, **kwargs):
    return [float(prompt[-1]["content"].endswith("Well?")) for prompt in prompts]


def right_call(completions, environments, **kwargs):
    return [float(one.found == one.answer) for one in environments]
'''


class Scripted(GenerationMixin):
    """Draws what `turns` says: (the expression of the problem, what the calculator gave or None) -> the next turn."""

    def __init__(self, tokenizer, turns):
        self.tokenizer, self.turns = tokenizer, turns
        self.expressions = {problem.prompt[0]["content"]: problem.expression for problem in PROBLEMS}

    def __call__(self, input_ids, attention_mask, generation_config, **kwargs):
        rows = []
        for ids, mask in zip(input_ids, attention_mask, strict=True):
            text = self.tokenizer.decode(ids[mask.bool()])
            expression = next(one for asked, one in self.expressions.items() if asked in text)
            given = text.rpartition("<tool_response>")[2].partition("</tool_response>")[0]
            rows.append(
                self.tokenizer(self.turns(expression, given if "<tool_response>" in text else None))["input_ids"]
            )
        width = max(map(len, rows))
        padded = [row + [self.tokenizer.pad_token_id] * (width - len(row)) for row in rows]
        return torch.cat([input_ids, torch.tensor(padded)], dim=1)


def calls(expression: str, name: str = "calculate") -> str:
    return f'<tool_call>{{"name": "{name}", "arguments": {{"expression": "{expression}"}}}}</tool_call>{END}'


def right_turns(expression, given):
    return calls(expression) if given is None else f" <answer>{given}</answer>{END}"


@pytest.fixture(scope="module")
def tokenizer():
    return build_agent_tokenizer()


@pytest.fixture
def evaluated(tokenizer, tmp_path, monkeypatch):
    """Evaluates a policy of these turns on the problems; returns (metrics, records)."""
    rows = [{"question": problem.prompt, "answer": problem.answer} for problem in PROBLEMS]
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "mine.py").write_text(AGENTS)
    monkeypatch.chdir(tmp_path)
    config = {"task": "dataset", "dataset_name": str(tmp_path), "prompt_column": "question", "seed": 0,
              "max_completion_length": 48, "use_cpu": True, "reward_funcs": ["tag_pref"]}  # fmt: skip

    def evaluate(turns, batch_size=4, output="step_000005", adapter=None, **more):
        model = build_model(tokenizer, seed=0).eval()
        model = model if adapter is None else get_peft_model(model, adapter)
        model.generate = Scripted(tokenizer, turns)
        monkeypatch.setattr(worker, "load_policy", lambda *which: (model, tokenizer))
        settings = settings_of(config | more, PROFILES["quick"], num_samples=2)
        check_functions(tmp_path, config | more, may_import=True)
        job = Job(Target(5, str(tmp_path)), settings, str(tmp_path / output), batch_size, "cpu")
        worker.evaluate(job, lambda done, total: None)
        summary = json.loads((tmp_path / output / "summary.json").read_text())
        return summary["metrics"], pd.read_parquet(tmp_path / output / "records.parquet"), model

    return evaluate


TOOLS = {"tools": ["trl_entropy.tasks.calculator:calculate"]}


def test_a_policy_that_always_calls_the_tool_correctly_scores_1(evaluated, tokenizer):
    metrics, records, _ = evaluated(right_turns, **TOOLS)
    assert [metrics[name]["value"] for name in ("pass@1", "pass@2", "greedy_accuracy", "rewards/tag_pref")] == [
        1.0
    ] * 4
    assert len(records) == 9 and records["correct"].all() and not records["clipped"].any()
    turns = {
        one.answer: len(tokenizer(calls(one.expression) + right_turns("", one.answer))["input_ids"])
        for one in PROBLEMS
    }
    assert [turns[row["answer"]] for _, row in records.iterrows()] == records["length"].tolist()
    assert all(len(row["logps"]) == len(row["entropies"]) == row["length"] for _, row in records.iterrows())
    assert records["completion"].str.contains("<tool_response>").all()


def called(first, then=right_turns):
    """Turns: a call, and what the policy says when it is answered."""
    return lambda expression, given: first(expression) if given is None else then(expression, given)


DOUBLE = {"tools": ["mine.py:double"]}
# Why -> (turns, settings, whether the policy gives an answer at all)
WRONG: dict[str, tuple] = {
    "it answers not what it was told": (called(calls, lambda *of: f" <answer>1</answer>{END}"), TOOLS, True),
    "it calls with other numbers": (called(lambda expression: calls("1+1")), TOOLS, True),
    "it calls what is not there": (called(lambda expression: calls(expression, "reckon")), TOOLS, False),
    "it may not call": (right_turns, TOOLS | {"max_tool_calling_iterations": 0}, False),
    "the tool says the answer, and the policy none": (
        called(lambda expression: calls(expression, "double"), lambda *of: f" I see{END}"), DOUBLE, False
    ),
}  # fmt: skip


@pytest.mark.parametrize("why", WRONG)
def test_a_policy_that_does_not_scores_0(evaluated, why):
    turns, more, answers = WRONG[why]
    metrics, records, _ = evaluated(turns, **more)
    assert metrics["pass@1"]["value"] == metrics["greedy_accuracy"]["value"] == 0.0
    assert (records["extracted"].notna() == answers).all()


def test_a_policy_that_needs_no_tool_is_right_without(evaluated):
    metrics, records, _ = evaluated(lambda e, given: f" <answer>{calculate(e)}</answer>{END}", **TOOLS)
    assert metrics["pass@1"]["value"] == 1.0 and not records["completion"].str.contains("tool").any()


ENVIRONMENT = {"environment_factory": "mine.py:Desk"}
KINDS: dict[str, tuple[Row, dict[str, float]]] = {
    "async tool": ({"tools": ["mine.py:calculate"]}, {"pass@1": 1.0}),
    "environment": (
        ENVIRONMENT | {"reward_funcs": ["mine.py:hinted", "tag_pref"], "metric_funcs": ["mine.py:right_call"]},
        {"pass@1": 1.0, "rewards/tag_pref": 1.0, "rewards/Desk": 1.0, "metrics/right_call": 1.0},
    ),
    "its reward passes": (ENVIRONMENT | {"reward_funcs": ["format_reward"], "pass_reward": "Desk"}, {"pass@1": 1.0}),
    "its reward alone": (ENVIRONMENT | {"reward_funcs": []}, {"pass@1": 1.0, "rewards/Desk": 1.0}),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_agents(evaluated, kind):
    more, expected = KINDS[kind]
    metrics, records, _ = evaluated(right_turns, **more)
    assert {name: metrics[name]["value"] for name in expected} == expected
    if "environment_factory" in more:
        assert records["prompt"].str.contains(r" Well\?\nResponse:").all()
        other = evaluated(
            lambda e, given: calls("1+1") if given is None else right_turns(e, given), output="other", **more
        )
        assert other[0]["rewards/Desk"]["value"] == 0.0


def test_scores_are_those_of_the_policys_own_tokens(evaluated, tokenizer):
    """Against a pass of the model over the whole episode, in float64."""
    _, records, model = evaluated(right_turns, **TOOLS, temperature=0.7)
    row = records.iloc[-1]
    problem = next(one for one in PROBLEMS if one.answer == row["answer"])
    prompt = rendered(problem.prompt, tokenizer)
    parts = [(calls(problem.expression), 1), (f"<tool_response>{problem.answer}</tool_response>\nResponse:", 0),
             (right_turns("", problem.answer), 1)]  # fmt: skip
    assert row["prompt"] == prompt and row["completion"] == "".join(text for text, _ in parts).replace(END, "")
    ids, own = tokenizer(prompt)["input_ids"], []
    start = len(ids)
    for text, mine in parts:
        written = tokenizer(text)["input_ids"]
        ids, own = ids + written, own + [mine] * len(written)
    with torch.no_grad():
        logits = model.double()(input_ids=torch.tensor([ids])).logits[0, start - 1 : -1] / 0.7
    logps, places = logits.log_softmax(-1), [place for place, mine in enumerate(own) if mine]
    drawn = torch.tensor(ids[start:])[places]
    assert row["completion_ids"].tolist() == drawn.tolist()
    assert row["logps"] == pytest.approx(logps[places, drawn].numpy(), abs=1e-4)
    assert row["entropies"] == pytest.approx(-(logps.exp() * logps).sum(-1)[places].numpy(), abs=1e-4)


def test_an_adapter_is_evaluated_as_it_is(evaluated):
    adapter = LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    metrics, records, model = evaluated(right_turns, adapter=adapter, output="adapter", **TOOLS)
    assert metrics["pass@1"]["value"] == 1.0 and not model.training
    without = evaluated(right_turns, **TOOLS)[1]
    assert records["length"].tolist() == without["length"].tolist()
    assert records["logps"][0][0] != without["logps"][0][0]


def test_options_that_episodes_do_not_have_are_refused(tmp_path, capsys):
    config = {"task": "calculator", "seed": 0, "max_completion_length": 48, "model_name_or_path": "embedded-agent"}
    (tmp_path / "config.yaml").write_text(json.dumps(config))
    args = parse(["--run", str(tmp_path)])
    for name, value, said in [
        ("sampler", "vllm", "--sampler is vllm, but the run has tools or environments; TRL's trainer draws"),
        ("device", "cuda:1", "takes the first GPU: use --device cuda, and CUDA_VISIBLE_DEVICES=1"),
    ]:
        asked = argparse.Namespace(**vars(args) | {name: value, "profile": "quick"})
        with pytest.raises(ValueError, match=said):
            _settings(asked, config)
    assert _settings(argparse.Namespace(**vars(args) | {"profile": "quick"}), config).sampler == "transformers"


def test_it_goes_on_where_it_was_cut_off(evaluated, monkeypatch):
    whole = evaluated(right_turns, batch_size=2, output="whole", **ENVIRONMENT)[1]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(worker, "_judged", lambda *rows: (_ for _ in ()).throw(KeyboardInterrupt))
        evaluated(right_turns, batch_size=2, **ENVIRONMENT)
    again = evaluated(lambda e, given: pytest.fail("drawn again"), batch_size=2, **ENVIRONMENT)[1]
    pd.testing.assert_frame_equal(whole, again)


def test_the_calculator_task_is_evaluated_on_its_held_out_problems():
    config = {"task": "calculator", "seed": 0, "max_completion_length": 48, "reward_funcs": ["tag_pref"]}
    settings = settings_of(config, PROFILES["quick"])
    assert settings.max_tool_calling_iterations == 48, "no limit, beside the length"
    assert settings_of(config | {"max_tool_calling_iterations": 1}, PROFILES["quick"]) == replace(
        settings, max_tool_calling_iterations=1
    )
    assert len(held_out_problems(settings, None)) == 64
    assert settings_of(config | {"task": "word_problems"}, PROFILES["quick"]).max_tool_calling_iterations is None
