import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_entropy import sft
from trl_entropy.data.word_problems import load_demonstrations, load_word_problems
from trl_entropy.embedded_model import build_model, build_tokenizer

DEMONSTRATIONS = {"prompt": ["1+1", "2+2+2"], "completion": ["=2", "=6<|endoftext|>"]}


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@pytest.fixture
def builds(monkeypatch):
    """Replaces the build by one that only writes what it was asked for; the list holds the seeds."""
    seeds = []

    def run_build(building: Path, seed: int) -> None:
        seeds.append(seed)
        (building / "model.safetensors").write_text(str(seed))
        (building / sft.COMPLETE_MARK).write_text("{}")

    monkeypatch.setattr(sft, "_run_build", run_build)
    return seeds


def test_only_completion_and_end_token_are_taught(tokenizer):
    dataset = sft.tokenize_demonstrations(Dataset.from_dict(DEMONSTRATIONS), tokenizer)
    assert dataset.column_names == ["input_ids", "labels"]
    for row, prompt, text in zip(dataset, DEMONSTRATIONS["prompt"], ["1+1=2", "2+2+2=6"], strict=True):
        num_prompt = len(tokenizer(prompt)["input_ids"])
        assert tokenizer.decode(row["input_ids"]) == f"{text}<|endoftext|>"
        assert row["labels"] == [-100] * num_prompt + row["input_ids"][num_prompt:]


def test_demonstrations_that_do_not_fit_are_dropped(tokenizer, caplog):
    dataset = sft.tokenize_demonstrations(Dataset.from_dict(DEMONSTRATIONS), tokenizer, max_length=6)
    assert [tokenizer.decode(ids) for ids in dataset["input_ids"]] == ["1+1=2<|endoftext|>"]
    assert "dropped 1 of 2 demonstrations longer than 6 tokens" in caplog.text
    with pytest.raises(ValueError, match="the shortest has 6"):
        sft.tokenize_demonstrations(Dataset.from_dict(DEMONSTRATIONS), tokenizer, max_length=5)


def test_bad_input_is_refused(tokenizer):
    with pytest.raises(ValueError, match=r"missing: \['completion'\]"):
        sft.tokenize_demonstrations(Dataset.from_dict({"prompt": ["a"]}), tokenizer)
    endless = build_tokenizer()
    endless.eos_token = None
    with pytest.raises(ValueError, match="no end-of-text token"):
        sft.tokenize_demonstrations(Dataset.from_dict(DEMONSTRATIONS), endless)


def test_training_matches_a_plain_loop(tokenizer, tmp_path):
    """Three steps of `SFTTrainer` by the recipe against AdamW written out."""
    dataset = load_demonstrations(48)
    trained = sft.train_sft(build_model(tokenizer, 0), tokenizer, dataset, sft.warm_start_config(tmp_path, 0)).model
    model = build_model(tokenizer, 0)
    decayed = [parameter for parameter in model.parameters() if parameter.dim() == 2]
    others = [parameter for parameter in model.parameters() if parameter.dim() != 2]
    groups = [{"params": decayed, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98))
    tokenized = sft.tokenize_demonstrations(dataset, tokenizer)
    for step in range(3):
        rows = tokenized.select(range(16 * step, 16 * step + 16))
        ids, labels = (
            torch.nn.utils.rnn.pad_sequence(list(map(torch.tensor, rows[name])), True, padding_value=value)
            for name, value in (("input_ids", 0), ("labels", -100))
        )
        logits = model(ids, attention_mask=(ids != 0).long()).logits[:, :-1]
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = sft.WARM_START_RECIPE["learning_rate"] * step / 20
        optimizer.step()
        optimizer.zero_grad()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(trained.get_parameter(name), parameter, atol=2e-5, rtol=0, msg=name)


def test_cache_is_built_once_per_seed(builds, tmp_path, capfd):
    first = sft.warm_start(tmp_path, seed=1)
    assert sft.warm_start(tmp_path, seed=1) == first
    assert sft.warm_start(tmp_path, seed=2) != first
    assert builds == [1, 2]
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 2 and str(first) in lines[0]
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} >= {first.name}


@pytest.mark.parametrize("name", ["version", "learning_rate"])
def test_the_recipe_is_part_of_the_key(builds, tmp_path, monkeypatch, name):
    first = sft.warm_start(tmp_path)
    monkeypatch.setitem(sft.WARM_START_RECIPE, name, 99)
    assert sft.warm_start(tmp_path) != first


def test_versions_are_part_of_the_key(builds, tmp_path, monkeypatch):
    first = sft.warm_start(tmp_path)
    monkeypatch.setattr(sft, "version", lambda name: "0")
    assert sft.warm_start(tmp_path) != first


def test_half_written_caches_are_never_used(builds, tmp_path):
    first = sft.warm_start(tmp_path)
    (first / sft.COMPLETE_MARK).unlink()
    leftover = tmp_path / f"{first.name}.building-killed"
    leftover.mkdir()
    assert sft.warm_start(tmp_path) == first
    assert builds == [0, 0]
    assert not leftover.exists()


def test_a_failed_build_leaves_nothing_and_says_why(tmp_path, monkeypatch):
    monkeypatch.setattr(sft, "sys", type("Broken", (), {"executable": "/bin/false", "stderr": sys.stderr}))
    with pytest.raises(RuntimeError, match="exit status 1"):
        sft.warm_start(tmp_path)
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


def test_processes_at_once_build_once(tmp_path):
    code = """
import sys, time
from pathlib import Path
from trl_entropy import sft

def slow(building, seed):
    with open(sys.argv[2], "a") as log:
        log.write("built\\n")
    time.sleep(0.5)
    (building / sft.COMPLETE_MARK).write_text("{}")

sft._run_build = slow
print(sft.warm_start(sys.argv[1]))
"""
    command = [sys.executable, "-c", code, str(tmp_path / "cache"), str(tmp_path / "log")]
    children = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    outputs = {child.communicate(timeout=120)[0] for child in children}
    assert [child.returncode for child in children] == [0, 0, 0]
    assert len(outputs) == 1
    assert (tmp_path / "log").read_text() == "built\n"


def test_cache_directories(monkeypatch):
    monkeypatch.delenv("TRL_ENTROPY_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert sft.default_cache_dir() == Path.home() / ".cache" / "trl_entropy"
    monkeypatch.setenv("XDG_CACHE_HOME", "xdg")
    assert sft.default_cache_dir() == Path("xdg/trl_entropy")
    monkeypatch.setenv("TRL_ENTROPY_CACHE", "own")
    assert sft.default_cache_dir() == Path("own")


def test_the_build_does_not_join_a_distributed_run(monkeypatch):
    launcher = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_PORT": "1", "ACCELERATE_USE_DEEPSPEED": "true"}
    for name, value in launcher.items():
        monkeypatch.setenv(name, value)
    environment = sft._single_process_environment()
    assert not launcher.keys() & environment.keys()
    assert environment["PATH"] == os.environ["PATH"]


def test_build_writes_a_complete_directory(tmp_path, monkeypatch):
    monkeypatch.setitem(sft.WARM_START_RECIPE, "num_clean", 16)
    monkeypatch.setitem(sft.WARM_START_RECIPE, "num_flawed", 16)
    sft.build_warm_start(tmp_path, 0)
    assert json.loads((tmp_path / sft.COMPLETE_MARK).read_text())["seed"] == 0
    assert AutoModelForCausalLM.from_pretrained(tmp_path).num_parameters() == 459_904
    assert len(AutoTokenizer.from_pretrained(tmp_path)) == len(build_tokenizer())


def test_warm_start_has_the_skill_and_ends_its_completions(warm_start_dir):
    """Greedy it must be right mostly; a round trip that changed the ids would leave a few percent."""
    model = AutoModelForCausalLM.from_pretrained(warm_start_dir)
    tokenizer = AutoTokenizer.from_pretrained(warm_start_dir)
    dataset = load_word_problems("test", 120)
    inputs = tokenizer(dataset["prompt"][:], return_tensors="pt", padding=True)
    completion_ids = model.generate(**inputs, max_new_tokens=32, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    texts = tokenizer.batch_decode(completion_ids, skip_special_tokens=True)
    right = [
        text.endswith(f"<answer>{answer}</answer>") for text, answer in zip(texts, dataset["answer"], strict=True)
    ]
    assert sum(right) / len(right) > 0.75
    assert (completion_ids == tokenizer.eos_token_id).any(dim=1).float().mean() > 0.95
