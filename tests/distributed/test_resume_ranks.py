"""Interrupted in one process group and resumed in another is uninterrupted, bit for bit, under every engine."""

import json
from pathlib import Path

import pytest
from launching import launch
from run_rows import without_clocks

from trl_entropy.runs.directory import RunDirectory

pytestmark = pytest.mark.slow

WORKER = Path(__file__).with_name("resume_worker.py")
CASES = {
    "full": {},
    "lora": {"lora": True},
    "generation window": {"steps_per_generation": 3, "num_iterations": 1},
    "two iterations": {"num_iterations": 2},
    "curriculum": {"curriculum": "pass_rate", "pass_reward": 0.9},
    "resampling": {"resample_uninformative_groups": True, "equal_often": True, "max_resample_rounds": 2},
    "second epoch": {"num_prompts_per_step": 16},  # two steps an epoch
}


def run(engine: str, directory: Path, runs: list[dict]) -> dict[str, str]:
    """The runs in one process group; their weights' hashes by name."""
    result = launch(engine, WORKER, str(directory), *map(json.dumps, runs), scratch=directory / "ops", timeout=400)
    assert result.returncode == 0, result.stdout[-6000:]
    return {run["name"]: (directory / run["name"] / "weights.txt").read_text() for run in runs}


@pytest.mark.parametrize("engine", ["ddp-cpu", "zero1-cpu", "zero2-cpu", "zero3-cpu", "fsdp2-cpu"])
def test_resumed_is_uninterrupted(engine, model_path, tmp_path):
    common = {"model_path": model_path}
    # The other cases are about what every engine shares; `tests/trainer/test_resume.py` has them in one process.
    names = list(CASES) if engine == "ddp-cpu" else ["full", "lora", "generation window"]
    if engine in ("zero3-cpu", "fsdp2-cpu"):
        common["kl_every"] = 0  # refused there
    cases = [CASES[name] | common for name in names]
    straight = [case | {"name": f"{name} straight"} for name, case in zip(names, cases, strict=True)]
    resumed = [case | {"name": f"{name} resumed", "resume": "latest"} for name, case in zip(names, cases, strict=True)]
    first = run(engine, tmp_path, straight + [case | {"stop_after": 3} for case in resumed])
    second = run(engine, tmp_path, resumed)
    for name in names:
        assert second[f"{name} resumed"] == first[f"{name} straight"] != first[f"{name} resumed"], name
        expected, got = (RunDirectory(tmp_path / f"{name} {kind}").metrics() for kind in ("straight", "resumed"))
        assert without_clocks(got) == without_clocks(expected) and len(got) == 5
        print(f"| {engine} | {name} | {first[f'{name} straight']} | {second[f'{name} resumed']} |")
    processes = json.loads((tmp_path / "full resumed" / "environment.json").read_text())["num_processes"]
    assert processes == 2


def test_another_number_of_processes_is_refused(model_path, tmp_path):
    settings = {"name": "run", "model_path": model_path, "resume": "latest"}
    run("cpu", tmp_path, [settings | {"stop_after": 2, "per_device_train_batch_size": 8}])
    result = launch("ddp-cpu", WORKER, str(tmp_path), json.dumps(settings), scratch=tmp_path / "ops", timeout=100)
    assert result.returncode != 0 and "world_size was 1 and is 2" in result.stdout
    assert len(RunDirectory(tmp_path / "run").metrics()) == 2
