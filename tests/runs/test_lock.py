"""One process at a time holds a run directory; however it ends, the next one can."""

import errno
import fcntl
import json
import multiprocessing
import os
import signal
import socket

import pytest

from trl_entropy.runs.lock import LOCK, RunIsLocked, locked


@pytest.fixture
def holder(tmp_path):
    """A process that holds the folder until it is told to end, or is killed."""
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()

    def hold():
        with locked(tmp_path):
            there.send("held")
            there.recv()

    process = context.Process(target=hold)
    process.start()
    assert here.recv() == "held"
    process.end = lambda: here.send("end")
    yield process
    process.kill()
    process.join()


def test_a_second_process_is_refused_and_told_who_the_first_is(holder, tmp_path):
    with pytest.raises(RunIsLocked) as refused, locked(tmp_path):
        pytest.fail("entered")
    assert f"{tmp_path} is being trained already, by process {holder.pid} on {socket.gethostname()} since 20" in str(
        refused.value
    )
    assert (tmp_path / LOCK).exists()  # it is the other one's


@pytest.mark.parametrize("killed", [True, False])
def test_the_next_process_can_when_the_first_has_ended(holder, tmp_path, killed):
    holder.kill() if killed else holder.end()
    holder.join(10)
    assert holder.exitcode == (-signal.SIGKILL if killed else 0)
    assert (tmp_path / LOCK).exists() == killed
    with locked(tmp_path):
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
    assert list(tmp_path.iterdir()) == []


def test_it_is_released_by_an_exception(tmp_path):
    for _ in range(2):
        with pytest.raises(ZeroDivisionError), locked(tmp_path / "run"):
            raise ZeroDivisionError


def test_who_opened_a_file_that_is_removed_meanwhile_locks_the_new_one(tmp_path, monkeypatch):
    lock, removals = fcntl.flock, []

    def after_the_removal(descriptor, operation):
        if not removals:
            removals.append((tmp_path / LOCK).unlink())
        lock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", after_the_removal)
    with locked(tmp_path), pytest.raises(RunIsLocked), locked(tmp_path):
        pytest.fail("entered")


def test_a_holder_that_has_not_said_who_it_is_is_another_process(holder, tmp_path):
    (tmp_path / LOCK).write_text("")
    with pytest.raises(RunIsLocked, match=r"already, by another process\. Wait"), locked(tmp_path):
        pytest.fail("entered")


def test_without_locks_it_goes_on_with_a_warning(tmp_path, monkeypatch, caplog):
    def without_locks(*given):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", without_locks)
    with locked(tmp_path), locked(tmp_path):
        pass
    assert f"the file system of {tmp_path} has no locks (No locks available): start no second" in caplog.text


def test_where_nothing_can_be_written_there_is_nothing_to_lock(tmp_path, monkeypatch):
    def read_only(*given):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(os, "open", read_only)
    with locked(tmp_path):
        pass
    monkeypatch.undo()
    assert list(tmp_path.iterdir()) == []


def test_other_errors_are_not_passed_over(tmp_path, monkeypatch):
    def broken(*given):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(fcntl, "flock", broken)
    with pytest.raises(OSError, match="Input/output"), locked(tmp_path):
        pytest.fail("entered")
