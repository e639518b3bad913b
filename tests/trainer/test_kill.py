"""`kill -9` at 20 seeded moments, ten of them while a checkpoint is written: the end is that of an unbroken run."""

import json
import multiprocessing
import os
import random
import signal
import time

import pytest
import torch
from datasets import Dataset

from trl_entropy.runs import checkpoints
from trl_entropy.runs.directory import RunDirectory
from trl_entropy.trainer import training_state

pytestmark = pytest.mark.slow

STEPS = 12
SETTINGS = {
    "max_steps": STEPS,
    "save_strategy": "steps",
    "save_steps": 1,
    "save_total_limit": 2,
    "steps_per_generation": 2,
    "entropy_probe": True,
    "entropy_probe_completions": "held_out",
    "entropy_probe_num_completions": 4,
    "effective_sample_size_probe": True,
}
# Where a kill comes while a checkpoint is written: before its parts, between them, before its seal, after it.
MOMENTS = ("optimizer", "rng", "state", "seal", "rotate")


def dies(function):
    def dying(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGKILL)

    return dying


def train(make_trainer, folder, dies_at=None):
    problems = Dataset.from_dict({"prompt": [f"{name} has {i} apples." for name in ("Ann", "Ben") for i in range(8)]})
    trainer = make_trainer(output_dir=str(folder), dataset=problems, **SETTINGS)
    if dies_at == "optimizer":
        trainer._save_optimizer_and_scheduler = dies(None)
    elif dies_at == "rng":
        trainer._save_rng_state = dies(None)
    elif dies_at == "state":
        training_state.save = dies(None)
    elif dies_at == "seal":
        checkpoints.seal = dies(None)
    elif dies_at == "rotate":
        trainer._delete_old_checkpoints = dies(None)
    trainer.train(resume_from_checkpoint="latest_or_new")  # it may have been killed before its first checkpoint
    return trainer


def attempt(make_trainer, folder, dies_at=None, seconds=None) -> int:
    """One process that trains until it dies, is killed, or is done; its exit code."""
    child = multiprocessing.get_context("fork").Process(target=train, args=(make_trainer, folder, dies_at))
    child.start()
    if seconds is not None:
        time.sleep(seconds)
        child.kill()
    child.join(120)
    assert child.exitcode is not None
    return child.exitcode


def flat(folder):
    from safetensors.torch import load_file

    return load_file(folder / f"checkpoint-{STEPS}" / "model.safetensors")


def test_killed_twenty_times_is_unbroken(make_trainer, tmp_path):
    straight, run = tmp_path / "straight", tmp_path / "killed"
    start = time.monotonic()
    train(make_trainer, straight)
    whole = time.monotonic() - start
    draw, killed = random.Random(0), 0
    for number in range(20):
        by_clock = number % 2
        code = attempt(
            make_trainer,
            run,
            dies_at=None if by_clock else draw.choice(MOMENTS),
            seconds=draw.uniform(0.1, 0.3) * whole if by_clock else None,
        )
        killed += code == -signal.SIGKILL
        rows = RunDirectory(run).metrics()  # readable whatever was cut off
        assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    assert killed >= 10  # the last ones may find the run done
    assert attempt(make_trainer, run) == 0
    expected, got = (
        [{k: v for k, v in row.items() if "time" not in k} for row in RunDirectory(path).metrics()]
        for path in (straight, run)
    )
    for one, two in zip(got, expected, strict=True):
        differing = {key: (value, two.get(key)) for key, value in one.items() if value != two.get(key)}
        assert {key: pair for key, pair in differing.items() if pair[0] == pair[0]} == {}  # nan differs from itself
    assert all(torch.equal(value, flat(straight)[name]) for name, value in flat(run).items())
    lines = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert lines == list(range(1, STEPS + 1))
    assert len(checkpoints.checkpoints_of(run)) == 2
