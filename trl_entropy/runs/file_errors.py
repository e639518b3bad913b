"""A file that cannot be written or read ends a command with one line, which says what to do about it."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from trl_entropy.runs.secrets import masked_text

_FULL = {errno.ENOSPC, errno.EDQUOT}
_FORBIDDEN = {errno.EACCES, errno.EPERM, errno.EROFS}
# What libraries that have exceptions of their own say of a full disk (safetensors, pyarrow, tokenizers).
_SAYS_FULL = ("no space left on device", "disk quota exceeded", "os error 28", "os error 122")
LEAST_FREE = 2**20  # bytes; torch does not say why it could not write


def is_full(error: BaseException, folder: Path | None = None) -> bool:
    """
    Whether an exception, or one that it came from, was raised because the disk or the quota is full.

    Args:
        folder: where the file was to be written; if its disk has less than a MiB left, the disk is full too.
    """
    for one in _chain(error):
        if (isinstance(one, OSError) and one.errno in _FULL) or any(text in str(one).lower() for text in _SAYS_FULL):
            return True
    return folder is not None and free_bytes(folder) < LEAST_FREE


def remedy(error: BaseException, folder: Path | None = None) -> str:
    """What to do about an error of a file, as the beginning of a sentence; if unknown, `"remove the cause"`."""
    if is_full(error, folder):
        return "make room on the disk"
    if any(isinstance(one, OSError) and one.errno in _FORBIDDEN for one in _chain(error)):
        return "choose another folder, or allow writing to this one"
    return "remove the cause"


def describe(error: BaseException, folder: Path | None = None) -> str:
    """An error in one line, with what to do where that is known; without the full stop at its end."""
    text, advice = masked_text(" ".join(str(error).split())).removesuffix("."), remedy(error, folder)
    return text if advice == "remove the cause" else f"{text}. {advice.capitalize()}"


@contextlib.contextmanager
def ending_in_one_line() -> Iterator[None]:
    """Inside, an `OSError` ends the program with one line and exit status 1, as every command does."""
    try:
        yield
    except BrokenPipeError:
        raise  # whoever read the output has left
    except OSError as error:
        sys.exit(f"Error: {describe(error)}.")


@contextlib.contextmanager
def as_os_error(target: Path) -> Iterator[None]:
    """Inside, a full disk is an `OSError` that names `target`, whatever exception the writing library has for it."""
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError) or not is_full(error, target.parent):
            raise
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target)) from error


def check_writable(folder: Path) -> None:
    """Raises `OSError` unless files can be written to the folder; what the check writes it removes."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"0" * 4096)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(folder)) from error


def _chain(error: BaseException) -> Iterator[BaseException]:
    one: BaseException | None = error
    while one is not None:
        yield one
        one = one.__cause__ or one.__context__


def existing_parent(path: Path) -> Path:
    """`path`, or the nearest folder above it that exists."""
    return next(parent for parent in (path.absolute(), *path.absolute().parents) if parent.exists())


def free_bytes(path: Path) -> int:
    """Space that is left on the disk on which `path` is, or will be."""
    return shutil.disk_usage(existing_parent(path)).free
