"""The process of an evaluation: what it is told of the training that starts it, how it is followed and ended."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
from small_evaluation import CONFIG

from trl_entropy.evaluation import process, session
from trl_entropy.evaluation.plan import PROFILES, Job, Target, settings_of

# A worker that starts what vLLM starts: processes that hold its output open and ignore SIGTERM, one of them in a
# session of its own. It leaves their numbers, and a temporary file.
FAMILY = """
import os, pathlib, signal, subprocess, sys, tempfile, time
stubborn = (
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('ready', flush=True); time.sleep(300)"
)
children = [
    subprocess.Popen([sys.executable, "-c", stubborn], start_new_session=own, stdout=subprocess.PIPE if own else None)
    for own in (False, True)
]
children[1].stdout.readline()
tempfile.NamedTemporaryFile(delete=False).close()
pathlib.Path({pids!r}).write_text(" ".join(map(str, [os.getpid(), *(child.pid for child in children)])))
print("progress 1 2", flush=True)
"""
# What starts the worker, in a process of its own, which a test ends. argv: code of the worker, output folder.
STARTER = """
import signal, subprocess, sys
from trl_entropy import evaluate
from trl_entropy.evaluation import process
from trl_entropy.evaluation.plan import PROFILES, Job, Target, settings_of
signal.signal(signal.SIGTERM, evaluate._exit_on_signal)
popen = subprocess.Popen
process.subprocess.Popen = lambda command, **how: popen([sys.executable, "-c", sys.argv[1], *command[3:]], **how)
settings = settings_of({config!r}, PROFILES["quick"])
print(process.run_job(Job(Target(0, "x"), settings, sys.argv[2], 8, "cpu"), 300.0))
"""


def job_of(tmp_path):
    return Job(Target(0, "x"), settings_of(CONFIG, PROFILES["quick"]), str(tmp_path / "step_000003"), 8, "cpu")


@pytest.fixture
def run(monkeypatch, tmp_path):
    """run(code, ...): `run_job` with Python code in place of the worker."""

    def run(code, timeout=60.0, **how):
        popen = subprocess.Popen

        def start(command, **k):
            return popen([sys.executable, "-c", code, *command[3:]], **k)

        monkeypatch.setattr(process.subprocess, "Popen", start)
        return process.run_job(job_of(tmp_path), timeout, **how)

    return run


@pytest.fixture
def temporary(monkeypatch, tmp_path):
    """The folder for temporary files; the worker gets one of its own in it."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr(process.tempfile, "tempdir", None)
    monkeypatch.setattr(session, "_GRACE", 1.0)
    return folder


def alive(pids):
    return [pid for pid in pids if psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE]


def family_of(path, seconds=60.0):
    """The numbers of the worker and its children, once they run."""
    deadline = time.monotonic() + seconds
    while not path.exists() or len(path.read_text().split()) < 3:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return [int(pid) for pid in path.read_text().split()]


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


def test_a_worker_that_says_why_it_fails_is_quoted_in_one_line(run, tmp_path):
    said = run("import sys; print('failed no such revision'); sys.exit('Traceback: 1, 2, 3')")
    assert said == f"no such revision; all messages are in {tmp_path / 'step_000003.log'}"
    assert "Traceback" in (tmp_path / "step_000003.log").read_text()


@pytest.mark.parametrize("ending", ["late", "cancelled", "by itself", "interrupted"])
def test_it_ends_with_all_that_it_started(run, temporary, tmp_path, ending):
    cancel, pids, begun = threading.Event(), tmp_path / "pids", []

    def show(done, total):
        begun.append(time.monotonic())
        if ending == "cancelled":
            cancel.set()
        elif ending == "interrupted":
            raise KeyboardInterrupt

    code = FAMILY.format(pids=str(pids)) + ("" if ending == "by itself" else "time.sleep(300)")
    timeout = 5.0 if ending == "late" else 60.0
    if ending == "interrupted":
        with pytest.raises(KeyboardInterrupt):
            run(code, timeout, show=show)
    else:
        said = run(code, timeout, show=show, cancel=cancel)
        late = "not finished after 5 s; what is generated is kept, call again to go on"
        assert said == {"late": late, "cancelled": process.CANCELLED, "by itself": None}[ending]
    assert time.monotonic() - begun[0] < 10 + (timeout if ending == "late" else 0)
    assert alive(family_of(pids)) == [] and list(temporary.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_it_ends_with_the_process_that_started_it(temporary, tmp_path, number):
    pids = tmp_path / "pids"
    watched = (
        "import sys; from trl_entropy.evaluation.session import end_with; end_with(int(sys.argv[2]), sys.argv[3])"
    )
    code = watched + FAMILY.format(pids=str(pids)) + "time.sleep(300)"
    with subprocess.Popen(
        [sys.executable, "-c", STARTER.format(config=CONFIG), code, str(tmp_path / "step_000003")],
        stderr=subprocess.PIPE,
        text=True,
    ) as starter:
        family = family_of(pids)
        assert alive(family) == family and list(temporary.iterdir())
        start = time.monotonic()
        starter.send_signal(number)
        while alive([starter.pid, *family]) and time.monotonic() < start + 10:
            starter.poll()
            time.sleep(0.1)
        assert alive([starter.pid, *family]) == [] and list(temporary.iterdir()) == []
        if number == signal.SIGTERM:
            assert starter.wait() == 128 + number and "call again to go on" in starter.stderr.read()


def test_the_worker_watches_its_parent_before_it_imports_anything_large(tmp_path):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    command = [sys.executable, "-X", "importtime", "-m", "trl_entropy.evaluation", "{}", str(gone.pid), str(tmp_path)]
    worker = subprocess.run(command, start_new_session=True, capture_output=True, text=True, timeout=60, check=False)
    assert worker.returncode == -signal.SIGKILL and not tmp_path.exists()


def test_what_a_killed_replacement_leaves_is_removed(run, tmp_path):
    """A worker that is killed while its results take the place of older ones."""
    code = (
        "import pathlib, sys, json, os, time; from trl_entropy.runs.durable import replacing\n"
        "with replacing(pathlib.Path(json.loads(sys.argv[1])['output'])) as new:\n"
        "    new.mkdir(); os.kill(os.getpid(), 9)"
    )
    Path(job_of(tmp_path).output).mkdir()
    assert run(code).startswith("exit status -9")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_000003", "step_000003.log"]
    assert os.listdir(job_of(tmp_path).output) == []
