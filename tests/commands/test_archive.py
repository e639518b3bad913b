"""An archive is complete and true, or has no manifest; the same command goes on, updates, checks."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from trl_entropy import archive as module
from trl_entropy.archive import archive

NAME = "it's a run [1] é"
METRICS = {"config.yaml": b"seed: 0\n", "metrics.jsonl": b'{"step": 1}\n', "evaluation/metrics.csv": b"step\n1\n"}
HEAVY = {"checkpoint-1/model.safetensors": bytes(range(256)) * 99, "probes/entropy/notes": b"e", "w.safetensors": b"w"}
UNFINISHED = {
    ".config.yaml.tmp": b"half",
    "probes/entropy/.tmpAbC123": b"half",
    ".rsync-partial/model.safetensors": b"half",
}


@pytest.fixture
def run(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(module, "_BLOCK", 1000)  # files of many blocks, and one that fills none
    for name, data in {**METRICS, **HEAVY, **UNFINISHED, "empty": b""}.items():
        path = tmp_path / "runs" / NAME / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return tmp_path / "runs" / NAME


@pytest.fixture(params=["file", "folder", "memory"])
def url(request, tmp_path, monkeypatch) -> str:
    monkeypatch.setattr(MemoryFileSystem, "store", {})
    monkeypatch.setattr(MemoryFileSystem, "pseudo_dirs", [""])
    folder = str(tmp_path / "archives")
    return {"file": f"file://{folder}", "folder": folder + "/", "memory": "memory://bucket/archives"}[request.param]


def stored(url: str) -> dict[str, bytes]:
    """Every file of the archive at `url`."""
    fs, folder = fsspec.core.url_to_fs(f"{url.rstrip('/')}/{NAME}")
    return {path[len(folder) + 1 :]: fs.cat_file(path) for path in fs.find(folder)}


def put(url: str, name: str, data: bytes) -> None:
    fs, folder = fsspec.core.url_to_fs(f"{url.rstrip('/')}/{NAME}")
    fs.makedirs(f"{folder}/{name}".rpartition("/")[0], exist_ok=True)
    fs.pipe_file(f"{folder}/{name}", data)


def test_archive_holds_the_run_and_says_so(run, url):
    done = archive(run, url)
    expected = {**METRICS, **HEAVY, "empty": b""}
    files = stored(url)
    manifest = json.loads(files.pop("manifest.json"))["files"]
    assert files == expected
    assert manifest == {n: {"size": len(d), "sha256": hashlib.sha256(d).hexdigest()} for n, d in expected.items()}
    assert sorted(done.copied) == sorted(expected)
    assert done.url.endswith(f"archives/{NAME}")


def test_metrics_only(run, url):
    archive(run, url, metrics_only=True)
    assert stored(url).keys() == {*METRICS, "empty", "manifest.json"}


def test_names_that_only_look_heavy_stay(run, url):
    (run / "probes.txt").write_bytes(b"a file")
    (run / "evaluation" / "checkpoint-1").write_bytes(b"a file")
    archive(run, url, metrics_only=True)
    assert {"probes.txt", "evaluation/checkpoint-1"} <= stored(url).keys()


def test_second_time_copies_nothing(run, url):
    archive(run, url)
    before = stored(url)
    assert archive(run, url).copied == []
    assert stored(url) == before


def test_third_time_copies_what_changed(run, url):
    archive(run, url)
    with open(run / "metrics.jsonl", "ab") as file:
        file.write(b'{"step": 2}\n')
    (run / "evaluation" / "metrics.csv").unlink()
    done = archive(run, url)
    assert done.copied == ["metrics.jsonl"]
    files = stored(url)
    assert files["metrics.jsonl"].count(b"\n") == 2
    assert "evaluation/metrics.csv" in files  # nothing is deleted there,
    assert "evaluation/metrics.csv" not in json.loads(files["manifest.json"])["files"]  # but it is not of this archive


@pytest.mark.parametrize("damage", [b"", b"seed: 1\n", b"seed: 0\nmore\n"])
def test_damage_there_is_found_and_repaired(run, url, damage):
    archive(run, url)
    put(url, "config.yaml", damage)
    assert archive(run, url).copied == ["config.yaml"]
    assert stored(url)["config.yaml"] == METRICS["config.yaml"]


@pytest.mark.parametrize("there_before", [False, True])
@pytest.mark.parametrize("num_copied", [0, 1, 3])
def test_interrupted_archive_looks_incomplete_and_goes_on(run, url, monkeypatch, num_copied, there_before):
    if there_before:
        archive(run, url)
        for path in [path for path in run.rglob("*") if path.is_file()]:
            path.write_bytes(path.read_bytes() + b"later")
    copy, calls = module._copy, []

    def copy_then_die(source, fs, target):
        calls.append(target)
        if len(calls) > num_copied:
            put(url, target.split(f"{NAME}/")[1], b"hal")  # what a store without atomic writes may show
            raise KeyboardInterrupt
        return copy(source, fs, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, "_copy", copy_then_die)
        archive(run, url)
    assert "manifest.json" not in stored(url)
    assert len(archive(run, url).copied) == len({**METRICS, **HEAVY, "empty": b""}) - num_copied
    files = stored(url)
    assert set(files) == set(json.loads(files["manifest.json"])["files"]) | {"manifest.json"}
    assert all(data == (run / name).read_bytes() for name, data in files.items() if name != "manifest.json")


def test_store_that_loses_bytes_is_an_error(run, url, monkeypatch):
    monkeypatch.setattr(module, "_digest_there", lambda fs, path: module.FileDigest(1, "other"))
    with pytest.raises(OSError, match="does not read back"):
        archive(run, url)
    assert "manifest.json" not in stored(url)


def test_file_that_grows_meanwhile_is_archived_as_sent(run, url, monkeypatch):
    digest_here = module._digest_here

    def digest_then_grow(path):
        digest = digest_here(path)
        if path.name == "metrics.jsonl":
            path.write_bytes(path.read_bytes() + b'{"step": 2}\n')
        return digest

    monkeypatch.setattr(module, "_digest_here", digest_then_grow)
    archive(run, url)
    files = stored(url)
    sha256 = json.loads(files["manifest.json"])["files"]["metrics.jsonl"]["sha256"]
    assert sha256 == hashlib.sha256(files["metrics.jsonl"]).hexdigest()


def test_what_is_no_run_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"no config\.yaml"):
        archive(tmp_path / "empty", "memory://x")


@pytest.mark.parametrize("place", ["", "checkpoint-1", ".."])
def test_archive_inside_the_run_is_refused(run, place):
    with pytest.raises(ValueError, match="into the run itself"):
        archive(run, str(run / place))


def test_unknown_protocol_and_missing_package_are_named(run, monkeypatch, capsys):
    with pytest.raises(SystemExit, match="nosuch"):
        module.main([str(run), "nosuch://bucket"])
    monkeypatch.setitem(sys.modules, "s3fs", None)  # as if it were not installed
    with pytest.raises(SystemExit, match=r"s3://bucket needs a package that is not installed.*s3fs"):
        module.main([str(run), "s3://bucket"])


def test_command(run, tmp_path):
    command = [sys.executable, "-c", "import sys; from trl_entropy.__main__ import main; main(); print(*sys.modules)"]
    result = subprocess.run([*command, "archive", str(run), str(tmp_path / "a")], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "7 files, 0.0 MB, 7 of them copied now" in result.stdout
    assert not {"torch", "transformers", "datasets"} & set(result.stdout.split())
    assert (tmp_path / "a" / NAME / "manifest.json").exists()
