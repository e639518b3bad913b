"""The warm start of the embedded model: built once, never half, the same everywhere; and what it can do."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_entropy.models import warm_start as module
from trl_entropy.models.embedded import build_tokenizer
from trl_entropy.tasks.word_problems import load_word_problems


@pytest.fixture
def builds(monkeypatch):
    """Replaces the build by one that only writes what it was asked for; the list holds the seeds."""
    seeds = []

    def run_build(building: Path, seed: int, name: str) -> None:
        seeds.append(seed)
        (building / "model.safetensors").write_text(str(seed))
        (building / module.COMPLETE_MARK).write_text("{}")

    monkeypatch.setattr(module, "_run_build", run_build)
    return seeds


def test_cache_is_built_once_per_seed(builds, tmp_path, capfd):
    first = module.warm_start(tmp_path, seed=1)
    assert module.warm_start(tmp_path, seed=1) == first
    assert module.warm_start(tmp_path, seed=2) != first
    assert builds == [1, 2]
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 2 and str(first) in lines[0]
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} >= {first.name}


@pytest.mark.parametrize("name", ["version", "learning_rate"])
def test_the_recipe_is_part_of_the_key(builds, tmp_path, monkeypatch, name):
    first = module.warm_start(tmp_path)
    monkeypatch.setitem(module.WARM_START_RECIPE, name, 99)
    assert module.warm_start(tmp_path) != first


def test_versions_are_part_of_the_key(builds, tmp_path, monkeypatch):
    first = module.warm_start(tmp_path)
    monkeypatch.setattr(module, "version", lambda name: "0")
    assert module.warm_start(tmp_path) != first


def test_half_written_caches_are_never_used(builds, tmp_path):
    first = module.warm_start(tmp_path)
    (first / module.COMPLETE_MARK).unlink()
    leftover = tmp_path / f"{first.name}.building-killed"
    leftover.mkdir()
    assert module.warm_start(tmp_path) == first
    assert builds == [0, 0]
    assert not leftover.exists()


def test_a_failed_build_leaves_nothing_and_says_why(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "sys", type("Broken", (), {"executable": "/bin/false", "stderr": sys.stderr}))
    with pytest.raises(RuntimeError, match="exit status 1"):
        module.warm_start(tmp_path)
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


def test_the_build_says_how_long_it_will_take_from_the_pace_of_its_own_steps(tmp_path, monkeypatch, capfd):
    """A clock that runs 3 s a step: 1000 steps, of which 940 are left where it says so."""
    from transformers import TrainerControl, TrainerState

    callback, state = module._time_left_callback(), TrainerState(max_steps=1000)
    monkeypatch.setattr(module.time, "perf_counter", lambda: 3.0 * state.global_step)
    for state.global_step in range(1, 1001):
        callback.on_step_end(None, state, TrainerControl())
    (line,) = capfd.readouterr().out.splitlines()
    assert line == "warm start: about 2820 s are left, at the pace of its first steps"


def test_what_the_build_says_is_shown_and_the_rest_is_kept(tmp_path, monkeypatch, capfd):
    says = "import sys; print('noise'); print('warm start: 5 s'); print('why', file=sys.stderr); sys.exit(3)"
    program = tmp_path / "python"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -c "{says}"\n')
    program.chmod(0o755)
    monkeypatch.setattr(module, "sys", type("Other", (), {"executable": str(program), "stderr": sys.stderr}))
    with pytest.raises(RuntimeError, match=r"exit status 3:\n(noise\nwhy|why\nnoise)"):
        module.warm_start(tmp_path / "cache")
    lines = capfd.readouterr().err.splitlines()
    assert lines[0].startswith("building the warm start, once; cached in ") and lines[1:] == ["warm start: 5 s"]


def test_the_agent_has_a_cache_of_its_own(builds, tmp_path):
    paths = {module.warm_start(tmp_path, seed=1, name=name) for name in ("embedded", "embedded-agent")}
    assert len(paths) == 2 and builds == [1, 1]


def test_processes_at_once_build_once(tmp_path):
    code = """
import sys, time
from pathlib import Path
from trl_entropy.models import warm_start as module

def slow(building, seed, name):
    with open(sys.argv[2], "a") as log:
        log.write("built\\n")
    time.sleep(0.5)
    (building / module.COMPLETE_MARK).write_text("{}")

module._run_build = slow
print(module.warm_start(sys.argv[1]))
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
    assert module.default_cache_dir() == Path.home() / ".cache" / "trl_entropy"
    monkeypatch.setenv("XDG_CACHE_HOME", "xdg")
    assert module.default_cache_dir() == Path("xdg/trl_entropy")
    monkeypatch.setenv("TRL_ENTROPY_CACHE", "own")
    assert module.default_cache_dir() == Path("own")


def test_the_build_does_not_join_a_distributed_run(monkeypatch):
    launcher = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_PORT": "1", "ACCELERATE_USE_DEEPSPEED": "true"}
    for name, value in launcher.items():
        monkeypatch.setenv(name, value)
    environment = module._single_process_environment()
    assert not launcher.keys() & environment.keys()
    assert environment["PATH"] == os.environ["PATH"]


def test_build_writes_a_complete_directory(tmp_path, monkeypatch):
    monkeypatch.setitem(module.WARM_START_RECIPE, "num_clean", 16)
    monkeypatch.setitem(module.WARM_START_RECIPE, "num_flawed", 16)
    module.build_warm_start(tmp_path, 0)
    assert json.loads((tmp_path / module.COMPLETE_MARK).read_text())["seed"] == 0
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
