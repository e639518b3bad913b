"""
Archive a run: `trl-entropy archive RUN URL [--metrics-only]` copies RUN to URL/<name of RUN>/ and verifies the copy.

URL is any that fsspec knows: `s3://bucket/folder`, `gs://...`, `file:///mnt/backup`, or a plain folder. The file
`manifest.json`, with the size and the SHA-256 of every file, is written last: an archive without it is incomplete.
Files that read back from the archive with the right size and SHA-256 are not copied again, so the same command
continues after an interruption, updates an older archive, or checks it. Nothing is ever deleted from the archive; a
file that the manifest does not name does not belong to it. This command imports no torch.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol, runtime_checkable

from trl_entropy.runs.counted import counted
from trl_entropy.runs.file_errors import describe
from trl_entropy.runs.lock import LOCK
from trl_entropy.runs.secrets import masked_text

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

MANIFEST = "manifest.json"
# What --metrics-only leaves out, the same as in launch/sync.sh.
_HEAVY_FOLDERS, _HEAVY_FILES = ("checkpoint-*", "probes"), ("*.safetensors",)
_UNFINISHED = ("*.tmp", ".tmp*", ".rsync-partial", LOCK)
_BLOCK = 1 << 22


@runtime_checkable
class _Reader(Protocol):
    def read(self, size: int, /) -> bytes: ...


@runtime_checkable
class _Writer(Protocol):
    def write(self, data: bytes, /) -> object: ...


class FileDigest(NamedTuple):
    """The size of a file in bytes and its SHA-256."""

    size: int
    sha256: str


class Archived(NamedTuple):
    """The result of `archive`: its URL, the digest of every file by its path, and the paths that were copied now."""

    url: str
    files: dict[str, FileDigest]
    copied: list[str]


def archive(run: Path, url: str, metrics_only: bool = False) -> Archived:
    """
    Copy a run to `url`/<name of the run>/ and verify it there.

    Args:
        run: the run directory. Use `metrics_only` while the run is going on, since it deletes old checkpoints.
        url: the folder in which the archive is made.
        metrics_only: leave out checkpoints, weights and the files of probes.

    Raises:
        ValueError: when `run` is not a run directory, the protocol of `url` is unknown, or `url` lies inside `run`.
        ImportError: when the package for the protocol of `url` is not installed.
        OSError: when reading or writing fails, or a file does not read back as it was written.
    """
    if not (run / "config.yaml").exists():
        raise ValueError(f"{run} holds no config.yaml; is it a run directory?")
    fs, target = _open_target(run, url)
    files = {name: _digest_here(run / name) for name in _names(run, metrics_only)}
    stale = [name for name, digest in files.items() if _digest_there(fs, f"{target}/{name}") != digest]
    manifest = f"{target}/{MANIFEST}"
    if stale and fs.exists(manifest):
        fs.rm_file(manifest)
    for name in stale:
        files[name] = _copy(run / name, fs, f"{target}/{name}")
    _write_manifest(fs, manifest, files)
    return Archived(fs.unstrip_protocol(target), files, stale)


def _open_target(run: Path, url: str) -> tuple[AbstractFileSystem, str]:
    """The file system of `url`, and the path of the archive on it."""
    from fsspec.core import url_to_fs
    from fsspec.implementations.local import LocalFileSystem

    try:
        fs, folder = url_to_fs(url, use_listings_cache=False)
    except ImportError as error:
        raise ImportError(f"{url} needs a package that is not installed. {error}") from error
    target = f"{folder.rstrip('/')}/{run.resolve().name}"
    if isinstance(fs, LocalFileSystem) and Path(target).resolve().is_relative_to(run.resolve()):
        raise ValueError(f"{url} would put the archive of {run} into the run itself. Choose another folder.")
    return fs, target


def _names(run: Path, metrics_only: bool) -> Iterator[str]:
    """The relative paths of the files to archive, sorted."""
    for path in sorted(run.rglob("*")):
        parts = path.relative_to(run).parts
        heavy = _any_matches(parts[:-1], _HEAVY_FOLDERS) or _any_matches(parts[-1:], _HEAVY_FILES)
        left_out = _any_matches(parts, _UNFINISHED) or parts == (MANIFEST,) or (metrics_only and heavy)
        if path.is_file() and not left_out:
            yield "/".join(parts)


def _any_matches(names: Sequence[str], patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for name in names for pattern in patterns)


def _digest_here(path: Path) -> FileDigest:
    with path.open("rb") as file:
        return _drain(file)


def _digest_there(fs: AbstractFileSystem, path: str) -> FileDigest | None:
    """The digest of the archived file; None if there is none."""
    if not fs.exists(path):
        return None
    with fs.open(path, "rb") as file:
        return _drain(file)


def _copy(source: Path, fs: AbstractFileSystem, target: str) -> FileDigest:
    """Copy a file and read it back. The digest is that of the bytes sent, as the source may grow meanwhile."""
    fs.makedirs(target.rpartition("/")[0], exist_ok=True)
    with source.open("rb") as file, fs.open(target, "wb") as copy:
        sent = _drain(file, copy)
    if (arrived := _digest_there(fs, target)) != sent:
        raise OSError(f"{target} does not read back as it was written: sent {sent}, read {arrived}. Try again.")
    return sent


def _drain(file: _Reader, copy: _Writer | None = None) -> FileDigest:
    """Read `file` to its end, block by block, and write it to `copy` if that is given; returns the digest."""
    size, sha256 = 0, hashlib.sha256()
    while block := file.read(_BLOCK):
        size += len(block)
        sha256.update(block)
        if copy is not None:
            copy.write(block)
    return FileDigest(size, sha256.hexdigest())


def _write_manifest(fs: AbstractFileSystem, path: str, files: dict[str, FileDigest]) -> None:
    content = {"files": {name: digest._asdict() for name, digest in files.items()}}
    text = json.dumps(content, indent=1, sort_keys=True).encode()
    if fs.exists(path):
        if fs.cat_file(path) == text:
            return
        fs.rm_file(path)
    # In a transaction the file appears when it is complete. Not `fs.mv`, which would read [1] in a name as a pattern.
    with fs.transaction, fs.open(path, "wb") as file:
        file.write(text)


def main(argv: list[str] | None = None) -> None:
    """Archive the run named on the command line."""
    parser = argparse.ArgumentParser(
        prog="trl-entropy archive",
        description="Copy a run to URL/<its name>/ and verify the copy. Call it again to continue, update or check.",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="the run directory")
    where = "where the archive goes: s3://bucket/runs, file:///mnt/backup, or any URL that fsspec knows"
    parser.add_argument("url", metavar="URL", help=where)
    parser.add_argument("--metrics-only", action="store_true", help="leave out checkpoint-*/, probes/, *.safetensors")
    args = parser.parse_args(argv)
    try:
        done = archive(args.run, args.url, args.metrics_only)
    except (ImportError, OSError, ValueError) as error:
        sys.exit(f"trl-entropy archive: {describe(error)}")
    size = sum(digest.size for digest in done.files.values())
    print(
        f"{masked_text(done.url)}: {counted(len(done.files), 'file')}, {size / 1e6:.1f} MB, {len(done.copied)} "
        "of them copied now"
    )


if __name__ == "__main__":
    main()
