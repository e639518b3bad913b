"""What `replacing` writes takes the place of the old file whole, and is on the disk before it does."""

import os

import pytest

from trl_entropy.runs import durable
from trl_entropy.runs.durable import discard_unfinished, replace_text, replacing


def names(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.mark.parametrize("error", [OSError("full"), KeyboardInterrupt("Ctrl-C")], ids=["OSError", "KeyboardInterrupt"])
def test_an_exception_leaves_the_old_file_and_nothing_else(tmp_path, error):
    replace_text(tmp_path / "new" / "file", "old")
    with pytest.raises(type(error), match=str(error)), replacing(tmp_path / "new" / "file") as temporary:
        temporary.write_text("ne")
        raise error
    assert (tmp_path / "new" / "file").read_text() == "old" and names(tmp_path) == ["new", "new/file"]


def test_a_folder_is_synced_after_all_that_is_in_it(tmp_path, monkeypatch):
    for name in ("a", "b/c", "b/d/e"):
        (tmp_path / "folder" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "folder" / name).write_text(name)
    synced = []
    monkeypatch.setattr(durable, "sync", lambda path: synced.append(str(path.relative_to(tmp_path))))
    durable.sync_tree(tmp_path / "folder")
    assert sorted(synced) == ["folder", *(f"folder/{name}" for name in ("a", "b", "b/c", "b/d", "b/d/e"))]
    assert synced[-1] == "folder"


def test_a_folder_takes_the_place_of_a_folder_whole(tmp_path):
    for text in ("first", "second"):
        with replacing(tmp_path / "folder") as temporary:
            temporary.mkdir()
            (temporary / text).write_text(text)
    assert names(tmp_path) == ["folder", "folder/second"]


def test_content_is_synced_before_the_name_and_the_name_after(tmp_path, monkeypatch):
    """A power failure after any of these calls finds the old file or the new one, whole."""
    calls = []
    monkeypatch.setattr(durable, "sync", lambda path: calls.append(("sync", path.name)))
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda old, new: (calls.append(("rename", new.name)), replace(old, new)))
    replace_text(tmp_path / "file", "text")
    assert calls == [("sync", ".file.tmp"), ("rename", "file"), ("sync", tmp_path.name)]


def test_what_a_killed_writer_left_does_not_hinder_the_next(tmp_path):
    (tmp_path / ".file.tmp").mkdir()
    (tmp_path / ".file.tmp" / "inside").write_text("half")
    replace_text(tmp_path / "file", "text")
    assert names(tmp_path) == ["file"]


class Killed(BaseException):
    """Stands for SIGKILL: nothing that would clean up is called."""


@pytest.mark.parametrize("renames", [0, 1, 2])
def test_what_a_process_leaves_that_is_killed_meanwhile_is_removed(tmp_path, monkeypatch, renames):
    """Killed before the first rename, between the two, and after both: one whole folder is left."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "old").write_text("old")
    replace, done = os.replace, []

    def rename(old, new):
        if len(done) == renames:
            raise Killed
        done.append(new)
        replace(old, new)

    remove = durable._remove

    def remove_before(path):
        if done or (renames == 0 and any(tmp_path.glob(".folder.tmp"))):
            raise Killed
        remove(path)

    with monkeypatch.context() as killed:
        killed.setattr(os, "replace", rename)
        killed.setattr(durable, "_remove", remove_before)
        with pytest.raises(Killed), replacing(tmp_path / "folder") as temporary:
            temporary.mkdir()
            (temporary / "new").write_text("new")
    assert len(done) == renames and len(names(tmp_path)) > 2
    discard_unfinished(tmp_path / "folder")
    assert names(tmp_path) == ["folder", "folder/new" if renames == 2 else "folder/old"]
    discard_unfinished(tmp_path / "folder")
    assert names(tmp_path) == ["folder", "folder/new" if renames == 2 else "folder/old"]
