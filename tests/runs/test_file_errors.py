"""A full disk and a folder that cannot be written are one line, whichever library meets them."""

import errno
import io
import shutil

import pytest
import torch
from safetensors import SafetensorError

from trl_entropy.runs import file_errors
from trl_entropy.runs.step_files import write_probe_file

FULL = OSError(errno.ENOSPC, "No space left on device")
QUOTA = OSError(errno.EDQUOT, "Disk quota exceeded", "file")
READ_ONLY = OSError(errno.EROFS, "Read-only file system", "file")
FORBIDDEN = PermissionError(errno.EACCES, "Permission denied", "file")
OTHER = OSError(errno.EIO, "Input/output error", "file")


def because_of(cause):
    try:
        raise RuntimeError("failed") from cause
    except RuntimeError as error:
        return error


def while_handling(cause):
    """As a library raises that fails while it cleans up, and says nothing of the cause."""
    try:
        try:
            raise type(cause)(*cause.args)
        except OSError:
            raise RuntimeError("failed")  # noqa: B904
    except RuntimeError as error:
        return error


@pytest.mark.parametrize("error, advice", [
    (FULL, "make room on the disk"),
    (QUOTA, "make room on the disk"),
    (because_of(FULL), "make room on the disk"),
    (while_handling(FULL), "make room on the disk"),
    (SafetensorError("I/O error: No space left on device (os error 28)"), "make room on the disk"),
    (READ_ONLY, "choose another folder, or allow writing to this one"),
    (FORBIDDEN, "choose another folder, or allow writing to this one"),
    (OTHER, "remove the cause"),
    (ValueError("x"), "remove the cause"),
])  # fmt: skip
def test_only_a_full_disk_asks_for_room(error, advice):
    assert file_errors.remedy(error) == advice
    line = file_errors.describe(error)
    assert "\n" not in line and (line.endswith(advice[1:]) or advice == "remove the cause")


def test_a_library_that_says_nothing_is_asked_for_the_space_that_is_left(tmp_path, monkeypatch):
    error = RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 128 vs 64")
    assert not file_errors.is_full(error, tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(2**30, 2**30, 1000))
    assert file_errors.is_full(error, tmp_path / "not" / "there")


def test_a_full_disk_is_an_os_error_that_names_the_file(tmp_path, monkeypatch):
    """safetensors has an exception of its own."""

    def full(*args):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(OSError, match=r"No space left on device.*step_000001\.safetensors") as error:
        write_probe_file(tmp_path, "entropy", 1, {"a": torch.zeros(1)}, {}, None)
    assert error.value.errno == errno.ENOSPC
    monkeypatch.setattr("safetensors.torch.save_file", lambda *args: (_ for _ in ()).throw(SafetensorError("other")))
    with pytest.raises(SafetensorError, match="other"):
        write_probe_file(tmp_path, "entropy", 1, {"a": torch.zeros(1)}, {}, None)


@pytest.mark.parametrize(
    "error", [FULL, QUOTA, READ_ONLY, FORBIDDEN, OTHER], ids=lambda error: errno.errorcode[error.errno]
)
def test_a_command_ends_in_one_line(error):
    @file_errors.ending_in_one_line()
    def main():
        raise error

    with pytest.raises(SystemExit) as end:
        main()
    assert str(end.value).startswith("Error: [Errno ") and error.strerror in str(end.value)
    assert "\n" not in str(end.value)


def test_a_reader_that_has_left_is_no_error_of_a_file():
    with pytest.raises(BrokenPipeError), file_errors.ending_in_one_line():
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")


def test_a_folder_is_checked_and_left_as_it_was(tmp_path, monkeypatch):
    file_errors.check_writable(tmp_path / "new")
    assert not any((tmp_path / "new").iterdir())
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"Not a directory.*file/run"):
        file_errors.check_writable(tmp_path / "file" / "run")

    class Full(io.BytesIO):
        def write(self, data):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("tempfile.TemporaryFile", lambda dir: Full())
    with pytest.raises(OSError, match=f"No space left on device: '{tmp_path}'"):
        file_errors.check_writable(tmp_path)
