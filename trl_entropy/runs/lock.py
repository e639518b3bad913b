"""One training at a time writes a run directory: a lock that the kernel releases when its process ends, however."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

logger = logging.getLogger(__name__)

LOCK = ".training.lock"
_NOT_SUPPORTED = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}


class RunIsLocked(ValueError):
    """Another process trains in the run directory now."""


@contextlib.contextmanager
def locked(run: Path) -> Iterator[None]:
    """
    Inside, no other process can train in the run directory.

    The file `.training.lock` says which process holds it; it is removed at the end, and what a killed process leaves
    of it locks nothing. Where the file system has no locks, a warning says that nothing keeps a second training out.
    Where nothing can be written there is nothing to lock.

    Raises:
        RunIsLocked: naming the process that holds it.
    """
    descriptor = _acquire(run / LOCK)
    try:
        yield
    finally:
        if descriptor is not None:
            with contextlib.suppress(OSError):
                (run / LOCK).unlink()  # before it is released: who takes it then has opened another file
            os.close(descriptor)


def _acquire(path: Path) -> int | None:
    """The descriptor of the locked file, or None if nothing could be locked."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            return None
        raise
    try:
        return _lock(descriptor, path)
    except BaseException:
        os.close(descriptor)
        raise


def _lock(descriptor: int, path: Path) -> int | None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise RunIsLocked(
            f"{path.parent} is being trained already, by {_holder(path)}. Wait until it has ended, or end it. If its "
            f"machine is gone, delete {path}."
        ) from error
    except OSError as error:
        if error.errno not in _NOT_SUPPORTED:
            raise
        logger.warning(
            "the file system of %s has no locks (%s): start no second training in it while this one runs",
            path.parent,
            error.strerror,
        )
        os.close(descriptor)
        return None
    if not _is_file_of(descriptor, path):  # its holder has removed it meanwhile
        os.close(descriptor)
        return _acquire(path)
    told = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, (json.dumps(told) + "\n").encode(), 0)
    return descriptor


def _is_file_of(descriptor: int, path: Path) -> bool:
    try:
        there = path.stat()
    except FileNotFoundError:
        return False
    mine = os.fstat(descriptor)
    return (there.st_dev, there.st_ino) == (mine.st_dev, mine.st_ino)


def _holder(path: Path) -> str:
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        return f"process {told['pid']} on {told['host']} since {told['since']}"
    except (OSError, ValueError, KeyError, TypeError):  # it is just writing that
        return "another process"


def training_of(run: Path) -> Literal["running", "killed", "none", "unknown"]:
    """
    Whether a process trains in the run directory now, read from the lock's file without touching the lock: "none" has
    left none, "killed" is gone without having removed it, "unknown" is on another machine or does not say.
    """
    try:
        told = json.loads((run / LOCK).read_text(encoding="utf-8"))
        process, host = int(told["pid"]), told["host"]
    except FileNotFoundError:
        return "none"
    except (OSError, ValueError, KeyError, TypeError):
        return "unknown"
    if host != socket.gethostname():
        return "unknown"
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return "killed"
    except OSError:  # it is another user's
        return "running"
    return "running"
