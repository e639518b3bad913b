"""Mistakes that a new user makes in names, columns and functions: each is one line, before a model is loaded."""

import json
import re
from types import SimpleNamespace

import pytest
import torch
import yaml

from trl_entropy import doctor, train
from trl_entropy.preflight import report
from trl_entropy.preflight.launch import Launch
from trl_entropy.train import _preflight as preflight

ROWS = [{"question": f"What is {i} + 1?", "solution": str(i + 1), "level": i % 2} for i in range(40)]
TALKS = [{"question": [{"role": "user", "content": row["question"]}]} for row in ROWS]
FUNCTIONS = """def right(prompts, completions, answer, most=3, **kwargs):
    return [float(one in text) for one, text in zip(answer, completions)]
def key(prompts, completions, key, **kwargs):
    return [float(one in text) for one, text in zip(key, completions)]
def dividing(prompts, completions, **kwargs):
    return [1 / len(text) for text in completions]
def one(prompts, completions, **kwargs):
    return [1.0]
def words(prompts, completions, **kwargs):
    return ["good" for _ in completions]
def of_texts(texts):
    return [1.0 for _ in texts]
def hard(row):
    return row["levl"] > 1
def nothing(row):
    return None
def add(a, b):
    return a + b
number = 3
class Empty:
    def look(self):
        return 1
class Desk(Empty):
    def reset(self, **row):
        return None
"""
SETTINGS = {
    "dataset_name": "rows.jsonl", "prompt_column": "question", "answer_column": "solution", "prompt_template": "r1",
    "reward_funcs": ["mine.py:right"], "model_name_or_path": "embedded", "output_dir": "run", "use_cpu": True,
    "bf16": False, "num_prompts_per_step": 4, "num_generations": 4, "per_device_train_batch_size": 16, "max_steps": 1,
}  # fmt: skip

MISTAKES = {
    "a setting": ({"dataset_nam": "rows.jsonl"}, "dataset_nam"),
    "no file": ({"dataset_name": "row.jsonl"}, "dataset_name: there is no file or folder row.jsonl"),
    "a kind of file": ({"dataset_name": "mine.py"}, "ends in none of .jsonl, .json, .csv"),
    "a broken file": ({"dataset_name": "cut.jsonl"}, "cut.jsonl, line 2: not JSON"),
    "a folder without splits": ({"dataset_name": "."}, "has no split 'train', it has cut, mixed, rows, talks"),
    "the prompts' column": ({"prompt_column": "quetion"}, "prompt_column: rows.jsonl has no column 'quetion'; its"),
    "the answers' column": ({"answer_column": "key"}, "answer_column: rows.jsonl has no column 'key'"),
    "no prompts": ({"prompt_column": "level"}, "a prompt must be a text or a list of messages"),
    "a template": ({"prompt_template": "r2"}, "prompt_template: there is no 'r2'; use none, r1, chat,"),
    "a template's function": ({"prompt_template": "mine.py:nothing"}, "a prompt must be a text or a list of messages"),
    "a filter": ({"dataset_filter": "mine.py:hard"}, "mine.py, line 14: KeyError: 'levl'"),
    "a filter of all": ({"dataset_filter": "mine.py:nothing"}, "rows.jsonl has no rows after dataset_filter"),
    "texts and conversations": (
        {"dataset_name": "mixed.jsonl", "prompt_template": "none"},
        "each column must have values of one kind",
    ),
    "conversations": (
        {"dataset_name": "talks.jsonl", "prompt_template": "none", "answer_column": "answer",
         "reward_funcs": ["mine.py:dividing"]},
        "the tokenizer has no chat template. Use a model that was taught to chat",
    ),
    "too few rows": ({"num_prompts_per_step": 64}, "but a step draws 64 different prompts"),
    "a file of functions": ({"reward_funcs": ["min.py:right"]}, "min.py (seen from "),
    "a function": ({"reward_funcs": ["mine.py:rigth"]}, "has no 'rigth'; it has right, key"),
    "a shipped function": ({"reward_funcs": ["tag_perf"]}, "there is no 'tag_perf'; is tag_pref meant?"),
    "a broken file of functions": ({"reward_funcs": ["broken.py:right"]}, "broken.py, line 1: SyntaxError"),
    "no function": ({"reward_funcs": ["mine.py:number"]}, "mine.py:number is no function, it is 3"),
    "its arguments": ({"reward_funcs": ["mine.py:of_texts"]}, "TypeError: of_texts() missing 1 required"),
    "a column that it needs": ({"reward_funcs": ["mine.py:key"]}, "missing 1 required positional argument: 'key'"),
    "an error in it": ({"reward_funcs": ["mine.py:dividing"]}, "mine.py, line 6: ZeroDivisionError"),
    "how many it returns": ({"reward_funcs": ["mine.py:one"]}, "must return a list of 3 numbers, one a completion"),
    "what it returns": ({"reward_funcs": ["mine.py:words"]}, "reward function words must return numbers"),
    "its settings": ({"reward_kwargs": {"right": {"mots": 2}}}, "takes no 'mots'; it takes prompts, completions, ans"),
    "whose settings": ({"reward_kwargs": {"wrong": {"most": 2}}}, "'wrong' is none of reward_funcs, which are right"),
    "weights": ({"reward_weights": [1.0, 2.0]}, "reward_weights has 2 numbers, reward_funcs 1"),
    "a metric": ({"metric_funcs": ["mine.py:words"]}, "metric function words must return numbers"),
    "a metric that is a reward": ({"metric_funcs": ["mine.py:right"]}, "right is a reward function too"),
    "what passes": ({"pass_reward": "correct"}, "pass_reward is 'correct', and names none of the functions right"),
    "a tool": ({"tools": ["mine.py:add"], "model_name_or_path": "embedded-agent"}, "needs a docstring that describes"),
    "tools without a model": ({"tools": ["mine.py:sum_of"]}, "has no 'sum_of'; it has right"),
    "an environment": ({"environment_factory": "mine.py:number"}, "is no class or function, it is 3"),
    "an environment without reset": ({"environment_factory": "mine.py:Empty"}, "has no method reset, which begins"),
    "an environment's tool": ({"environment_factory": "mine.py:Desk"}, "Desk.look, which the policy may call, needs"),
}  # fmt: skip


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A new user's folder; loading a model fails the test."""
    lines = {
        "rows": ROWS,
        "talks": TALKS,
        "mixed": [{**ROWS[0]}, *TALKS],
    }
    for name, rows in lines.items():
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "cut.jsonl").write_text('{"question": "a"}\n{"question": ')
    (tmp_path / "mine.py").write_text(FUNCTIONS)
    (tmp_path / "broken.py").write_text("def right(:\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "_preflight", lambda *_: None)
    monkeypatch.setattr(train, "load_policy", lambda *_: pytest.fail("a model was about to be loaded"))
    return tmp_path


@pytest.mark.parametrize("change, said", MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_one_line_of_train(folder, change, said):
    (folder / "mine.yaml").write_text(yaml.safe_dump(SETTINGS | change))
    with pytest.raises(SystemExit) as ended:
        train.main(["--config", "mine.yaml"])
    line = str(ended.value)
    assert said in line and line.startswith("Error") and "\n" not in line


def said_by_both(arguments):
    """What train ends with, and the problems that doctor finds, each with its remedy."""
    with pytest.raises(SystemExit) as ended:
        train.main(arguments)
    _, found = doctor.diagnose(*doctor._options().parse_known_args(arguments))
    problems = [" ".join(str(finding).split()).removesuffix(".") for finding in found if finding.is_problem]
    return str(ended.value).removeprefix("Error in the settings: ").removeprefix("Error: ").removesuffix("."), problems


@pytest.mark.parametrize("name", MISTAKES)
def test_doctor_says_it_in_the_same_words(folder, name):
    (folder / "mine.yaml").write_text(yaml.safe_dump(SETTINGS | MISTAKES[name][0]))
    line, problems = said_by_both(["--config", "mine.yaml"])
    assert line in problems


# Of the run and its machine: what only training itself would say in other words, if it came to that.
OF_THE_RUN = {
    "a package": ({"use_vllm": True}, "need the package vllm, which is not installed here. Do: pip"),
    "a tracker's package": ({"report_to": ["wandb"]}, "pip install wandb, or set report_to: tensorboard"),
    "a tracker": ({"report_to": ["tensorbord"]}, "report_to has tensorbord, which transformers does not know. Use"),
    "a kernel": ({"attn_implementation": "flash_attention_2"}, "or attn_implementation: sdpa"),
    "no model": ({"model_name_or_path": "nobody/nothing"}, "is no folder here .* Give a folder with the model, or"),
    "a folder without a model": ({"model_name_or_path": "."}, "is a folder without config.json. Give a folder with"),
    "offline": ({"model_name_or_path": "Qwen/Qwen2.5-0.5B"}, "HF_HUB_OFFLINE=1 forbids a download. Download the"),
    "layers": (
        {"use_peft": True, "lora_dropout": 0.0, "lora_target_modules": ["nothing"]}, "cannot be built .*nothing"
    ),
    "a quantised model": ({"load_in_8bit": True, "entropy_probe": True}, "bitsandbytes, which is not installed here"),
    "half precision": ({"fp16": True, "entropy_probe": True}, "loss scaling changes .* Set bf16: true, fp16: false"),
    "kept gradients": (
        {"fisher_probe": True, "fisher_num_sequences": 16, "probe_rows_gib": 1e-4}, "Set fisher_sketch_dim=4096"
    ),
    "a file in the way": ({"output_dir": "rows.jsonl/run"}, "rows.jsonl is a file. Choose another output_dir"),
    "a checkpoint": ({"resume_from_checkpoint": "missing"}, "missing is no checkpoint"),
    "an optimizer": ({"optim": "sgd", "optimizer_state_probe": True}, "reads Adam's moments, but optim is sgd. Set"),
    "a batch": ({"per_device_train_batch_size": 7}, "do not divide into 1 process .* Try per_device_train_batch_size"),
    "an engine": ({"entropy_probe": True}, "entropy_probe does not work with engine fsdp1. .* set fsdp_version: 2"),
}  # fmt: skip


@pytest.mark.parametrize("name", OF_THE_RUN)
def test_train_gives_doctors_remedy(folder, name, monkeypatch):
    monkeypatch.setattr(train, "_preflight", preflight)
    change, said = OF_THE_RUN[name]
    if name == "an engine":
        fsdp1 = Launch("fsdp1", num_processes=1, num_asked=1, source="the environment")
        monkeypatch.setattr(report, "launch_from_environment", lambda *_: fsdp1)
        monkeypatch.setattr(doctor, "_launch", lambda *_: fsdp1)
    (folder / "mine.yaml").write_text(yaml.safe_dump(SETTINGS | change))
    line, problems = said_by_both(["--config", "mine.yaml"])
    assert line in problems and re.search(said, line), line


def test_an_estimate_is_told_and_stops_nothing(folder, monkeypatch, caplog):
    caplog.set_level("INFO", "trl_entropy")
    monkeypatch.setattr(train, "_preflight", preflight)
    monkeypatch.setattr("trl_entropy.preflight.checks.free_bytes", lambda *_: 2**21)
    (folder / "mine.yaml").write_text(yaml.safe_dump(SETTINGS))
    with pytest.raises(pytest.fail.Exception, match="about to be loaded"):
        train.main(["--config", "mine.yaml"])
    _, found = doctor.diagnose(*doctor._options().parse_known_args(["--config", "mine.yaml"]))
    (problem,) = [finding for finding in found if finding.is_problem]
    assert f"problem: {problem}" in caplog.messages and "Set save_total_limit" in str(problem)


@pytest.mark.parametrize("raised, said", [
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."), "memory ran out: CUDA out of memory. .*"
     "(Lower|use LoRA)"),
    (NotImplementedError("training with XLA is not supported; use DDP"), "training with XLA .* use DDP."),
])  # fmt: skip
def test_what_training_itself_ends_with(folder, raised, said, monkeypatch):
    def failing(*_, **__):
        raise raised

    trainer = SimpleNamespace(train=failing)
    monkeypatch.setattr(train, "build_trainer", lambda *_: trainer)
    monkeypatch.setattr(train, "_say_start", lambda *_: None)
    (folder / "mine.yaml").write_text(yaml.safe_dump(SETTINGS))
    with pytest.raises(SystemExit) as ended:
        train.main(["--config", "mine.yaml"])
    assert re.fullmatch(f"Error: {said}.*", str(ended.value)), ended.value


def test_without_a_mistake_a_model_would_be_loaded(folder):
    (folder / "mine.yaml").write_text(yaml.safe_dump(SETTINGS))
    with pytest.raises(pytest.fail.Exception, match="about to be loaded"):
        train.main(["--config", "mine.yaml"])
