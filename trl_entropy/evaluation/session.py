"""A process and all that it started, ended together: its session of processes, and what has left the session."""

from __future__ import annotations

import os
import shutil
import signal
import threading
import time
from collections.abc import Collection

import psutil

_GRACE = 3.0  # seconds between SIGTERM and SIGKILL
_LOOK_EVERY = 0.1  # seconds
_LOOK_FOR_PARENT_EVERY = 0.5  # seconds


def end_session(leader: int, temporary: str, spare: Collection[int] = ()) -> None:
    """
    Ends all processes of a session and all that they started; returns when they are gone, after about 6 s at most.

    Args:
        leader: the process id of the one that was started with `start_new_session=True`; it may have ended already.
        temporary: its `TMPDIR`, a folder of its own; who has the same was started by it, whoever its parent is now.
        spare: process ids that are left alone.
    """
    found: set[psutil.Process] = set()
    for number in (signal.SIGTERM, signal.SIGKILL):
        found |= {one for one in psutil.process_iter() if _belongs(one, leader, temporary) and one.pid not in spare}
        for process in found:
            _send(process, number)
        deadline = time.monotonic() + _GRACE
        while any(_is_alive(process) for process in found) and time.monotonic() < deadline:
            time.sleep(_LOOK_EVERY)


def _belongs(process: psutil.Process, leader: int, temporary: str) -> bool:
    try:
        return os.getsid(process.pid) == leader or process.environ().get("TMPDIR") == temporary
    except (psutil.Error, OSError):  # it has ended meanwhile, or is another user's
        return False


def _send(process: psutil.Process, number: int) -> None:
    try:
        process.send_signal(number)
    except psutil.Error:  # it has ended meanwhile
        return


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def end_with(parent: int, temporary: str) -> None:
    """
    From now on this process, which leads a session, ends with its session as soon as its parent has ended.

    The parent ends it in all other cases; this one is for a parent that was killed with SIGKILL.

    Args:
        parent: the process id of the parent, told by the parent: it may have ended already.
        temporary: a folder that is removed then.
    """
    threading.Thread(target=_end_after, args=(parent, temporary), daemon=True).start()


def _end_after(parent: int, temporary: str) -> None:
    while os.getppid() == parent:
        time.sleep(_LOOK_FOR_PARENT_EVERY)
    end_session(os.getpid(), temporary, spare=[os.getpid()])
    shutil.rmtree(temporary, ignore_errors=True)
    os.kill(os.getpid(), signal.SIGKILL)
