"""
Archive of a run: `trl-entropy archive RUN URL [--metrics-only]` copies RUN to URL/<name of RUN>/.

URL is any that fsspec knows: `s3://bucket/folder`, `gs://...`, `file:///mnt/backup`, or a plain folder.
`manifest.json`, with size and SHA-256 of every file, is written last: an archive without it is not complete. A file
counts as archived when what lies there reads back with its size and SHA-256. Only others are copied, so that the same
command goes on after an interruption, brings an older archive up to date, or checks it. No file of a run is ever
deleted there, but what the manifest does not name is not of this archive. Imports no torch.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

MANIFEST = "manifest.json"
# Left out with --metrics-only, as in launch/sync.sh.
_HEAVY_FOLDERS, _HEAVY_FILES = ("checkpoint-*", "probes"), ("*.safetensors",)
_UNFINISHED = ("*.tmp", ".rsync-partial")
_BLOCK = 1 << 22


class FileDigest(NamedTuple):
    """Size in bytes and SHA-256 of a file."""

    size: int
    sha256: str


class Archived(NamedTuple):
    """What `archive` did: the archive's URL, the digest of every file by its path, the paths that were copied."""

    url: str
    files: dict[str, FileDigest]
    copied: list[str]


def archive(run: Path, url: str, metrics_only: bool = False) -> Archived:
    """
    Copy a run to `url`/<name of the run>/ and verify it there.

    Args:
        run: the run directory. A run that is still being written: `metrics_only`, as its checkpoints come and go.
        url: of the folder that is to hold the archive.
        metrics_only: without checkpoints, weights and the probes' tensors.

    Raises:
        ValueError: when `run` is no run directory, nothing knows the protocol of `url`, or `url` lies in `run`.
        ImportError: when the package of its protocol is not installed.
        OSError: when a file does not read back as it was written, or reading or writing fails.
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


def _open_target(run: Path, url: str) -> tuple[Any, str]:
    """File system, and path of the archive on it."""
    from fsspec.core import url_to_fs
    from fsspec.implementations.local import LocalFileSystem

    try:
        fs, folder = url_to_fs(url, use_listings_cache=False)
    except ImportError as error:
        raise ImportError(f"{url} needs a package that is not installed. {error}") from error
    target = f"{folder.rstrip('/')}/{run.resolve().name}"
    if isinstance(fs, LocalFileSystem) and Path(target).resolve().is_relative_to(run.resolve()):
        raise ValueError(f"{url} would put the archive of {run} into the run itself; choose another folder.")
    return fs, target


def _names(run: Path, metrics_only: bool) -> Iterator[str]:
    """Paths below `run`, in order."""
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


def _digest_there(fs: Any, path: str) -> FileDigest | None:
    """Of what reads back; None when nothing lies there."""
    if not fs.exists(path):
        return None
    with fs.open(path, "rb") as file:
        return _drain(file)


def _copy(source: Path, fs: Any, target: str) -> FileDigest:
    """Stream a file there and read it back. The digest is of the bytes sent: a live run's file may have grown."""
    fs.makedirs(target.rpartition("/")[0], exist_ok=True)
    with source.open("rb") as file, fs.open(target, "wb") as copy:
        sent = _drain(file, copy)
    if (arrived := _digest_there(fs, target)) != sent:
        raise OSError(f"{target} does not read back as it was written: sent {sent}, there is {arrived}. Run again.")
    return sent


def _drain(file: Any, copy: Any = None) -> FileDigest:
    """Read to the end, into `copy` if there is one, a block at a time."""
    size, sha256 = 0, hashlib.sha256()
    while block := file.read(_BLOCK):
        size += len(block)
        sha256.update(block)
        if copy is not None:
            copy.write(block)
    return FileDigest(size, sha256.hexdigest())


def _write_manifest(fs: Any, path: str, files: dict[str, FileDigest]) -> None:
    content = {"files": {name: digest._asdict() for name, digest in files.items()}}
    text = json.dumps(content, indent=1, sort_keys=True).encode()
    if fs.exists(path):
        if fs.cat_file(path) == text:
            return
        fs.rm_file(path)
    with (
        fs.transaction,
        fs.open(path, "wb") as file,
    ):  # appears whole, at the end; fs.mv takes [1] in a name for a glob
        file.write(text)


def main(argv: list[str] | None = None) -> None:
    """Archive the run named on the command line."""
    parser = argparse.ArgumentParser(
        prog="trl-entropy archive",
        description="Copy a run to URL/<its name>/ and verify it there. The same command goes on, updates, checks.",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="run directory")
    parser.add_argument(
        "url", metavar="URL", help="a folder: s3://bucket/runs, file:///mnt/backup, any that fsspec knows"
    )
    parser.add_argument("--metrics-only", action="store_true", help="leave out checkpoint-*/, probes/, *.safetensors")
    args = parser.parse_args(argv)
    try:
        done = archive(args.run, args.url, args.metrics_only)
    except (ImportError, OSError, ValueError) as error:
        sys.exit(f"trl-entropy archive: {error}")
    size = sum(digest.size for digest in done.files.values())
    print(f"{done.url}: {len(done.files)} files, {size / 1e6:.1f} MB, {len(done.copied)} of them copied now")


if __name__ == "__main__":
    main()
