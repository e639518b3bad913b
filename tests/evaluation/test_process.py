"""The process of an evaluation: what it is told of the training that starts it, how it is followed and ended."""

import sys
import threading
import time

import pytest
from small_evaluation import CONFIG

from trl_entropy.evaluation import process
from trl_entropy.evaluation.plan import PROFILES, Job, Target, settings_of


@pytest.fixture
def run(monkeypatch, tmp_path):
    """run(code, ...): `run_job` with Python code in place of the worker."""

    def run(code, timeout=60.0, **how):
        popen = process.subprocess.Popen
        monkeypatch.setattr(process.subprocess, "Popen", lambda command, **k: popen([sys.executable, "-c", code], **k))
        job = Job(Target(3, "x"), settings_of(CONFIG, PROFILES["quick"]), str(tmp_path / "step_000003"), 8, "cpu")
        return process.run_job(job, timeout, **how)

    return run


def test_it_takes_itself_for_no_rank_of_the_training_that_starts_it(run, monkeypatch, tmp_path):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "ACCELERATE_USE_DEEPSPEED", "TORCHELASTIC_RUN_ID"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    assert run("import os, sys; sys.exit(' '.join(sorted(os.environ)))").startswith("exit status 1")
    names = (tmp_path / "step_000003.log").read_text().split()
    assert "CUDA_VISIBLE_DEVICES" in names
    assert not [
        name for name in names if name.startswith(("RANK", "WORLD", "LOCAL", "MASTER", "ACCELERATE", "TORCHE"))
    ]


def test_progress_is_shown_and_a_success_leaves_no_log(run, tmp_path):
    seen = []
    code = "print('other', 1); print('progress', 3, 8); print('progress', 8, 8)"
    assert run(code, show=lambda *done: seen.append(done)) is None
    assert seen == [(3, 8), (8, 8)] and not list(tmp_path.iterdir())


def test_it_is_ended_when_cancelled_and_when_late(run):
    cancel, start = threading.Event(), time.monotonic()
    threading.Timer(0.3, cancel.set).start()
    assert run("import time; time.sleep(100)", cancel=cancel) == process.CANCELLED
    assert run("import time; time.sleep(100)", timeout=0.3) == "not finished after 0 s; raise --timeout"
    assert time.monotonic() - start < 20
