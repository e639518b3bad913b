"""Files that are there whole or not at all, also after a power failure: written, synced, then renamed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """
    A path to write a file or a folder to, which takes the place of `target` when the block ends without an exception.

    It is beside `target` and hidden. After an exception it is removed, and `target` is what it was before.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.tmp")
    _remove(temporary)
    try:
        yield temporary
        sync_tree(temporary)
        if target.is_dir():  # nothing is renamed onto a folder that holds files, and a half removed one looks whole
            former = target.with_name(f".{target.name}.former.tmp")
            _remove(former)
            os.replace(target, former)
            os.replace(temporary, target)
            _remove(former)
        else:
            os.replace(temporary, target)
    except BaseException:
        _remove(temporary)
        raise
    sync(target.parent)


def discard_unfinished(target: Path) -> None:
    """Remove what a process leaves that is killed while [`replacing`] `target`; what it was to replace stays."""
    former = target.with_name(f".{target.name}.former.tmp")
    if former.is_dir() and not target.exists():
        os.replace(former, target)
    for rest in (former, target.with_name(f".{target.name}.tmp")):
        _remove(rest)


def discard_unfinished_files(folder: Path) -> None:
    """
    Remove the temporary files that killed processes have left in a folder, in which nobody writes now: those of
    [`replacing`], and those of the safetensors library, `.tmpAbC123`, which renames its files too.
    """
    for pattern in (".*.tmp", ".tmp*"):
        for rest in folder.glob(pattern):
            _remove(rest)


def replace_text(target: Path, text: str) -> None:
    """Put a file with `text` in the place of `target`."""
    replace_bytes(target, text.encode())


def replace_bytes(target: Path, content: bytes) -> None:
    """Put a file with this content in the place of `target`."""
    with replacing(target) as temporary:
        temporary.write_bytes(content)


def sync(path: Path) -> None:
    """Wait until a file's content, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(path: Path) -> None:
    """[`sync`] for a file, or for a folder with everything in it."""
    if path.is_dir():
        for inside in sorted(path.rglob("*")):
            sync(inside)
    sync(path)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
