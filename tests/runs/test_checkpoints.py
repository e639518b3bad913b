"""Seals: what is no seal is a damaged checkpoint that is named and passed over, whatever it holds."""

import json
import logging
import os

import pytest

from trl_entropy.runs import checkpoints, durable
from trl_entropy.runs.checkpoints import CheckpointError

CONTRACT = {"settings": {"seed": 1, "delta": None, "world_size": 1, "reward_funcs": ["a"]}, "data": "d", "model": "m"}


@pytest.fixture
def run(tmp_path):
    for step in (1, 2):
        path = tmp_path / f"checkpoint-{step}"
        path.mkdir()
        (path / "model.bin").write_bytes(bytes([step]) * 100)
        checkpoints.seal(path, {"step": step, **CONTRACT})
    return tmp_path


def whole_seal(run):
    return (run / "checkpoint-2" / checkpoints.SEAL).read_bytes()


DAMAGED = {
    "empty": lambda whole: b"",
    "cut in the middle": lambda whole: whole[: len(whole) // 2],
    "cut by a byte": lambda whole: whole[:-1],
    "zeros": lambda whole: bytes(len(whole)),
    "a list": lambda whole: b"[]",
    "a number": lambda whole: b"3",
    "null": lambda whole: b"null",
    "no text": lambda whole: b"\xff\xfe\x00",
    "without files": lambda whole: json.dumps(json.loads(whole) | {"files": {}}).encode(),
    "files of another form": lambda whole: json.dumps(json.loads(whole) | {"files": {"model.bin": 3}}).encode(),
    "without step": lambda whole: json.dumps({"files": json.loads(whole)["files"]}).encode(),
}


FILES = {
    "cut": (lambda file: file.write_bytes(bytes([2]) * 99), "model.bin has 99 bytes, it was written with 100", True),
    "gone": (lambda file: file.unlink(), "model.bin is missing, it was written with 100", True),
    "changed": (lambda file: file.write_bytes(bytes([2]) * 99 + b"x"), "model.bin is damaged: its checksum", False),
}


@pytest.mark.parametrize("harm", FILES)
def test_a_file_that_is_not_as_it_was_sealed_is_named_and_the_older_checkpoint_taken(run, harm, caplog):
    do, message, shows_in_the_size = FILES[harm]
    do(run / "checkpoint-2" / "model.bin")
    for checksums in (True, False):
        sees = checksums or shows_in_the_size
        assert checkpoints.newest_complete(run, checksums) == run / f"checkpoint-{1 if sees else 2}"
        if sees:
            with pytest.raises(CheckpointError, match=message):
                checkpoints.resolve(str(run / "checkpoint-2"), run, checksums)
    assert message in caplog.text


def test_the_checksum_is_of_the_whole_file(run, monkeypatch):
    """Also where it is read in parts: a change in any of them is seen."""
    monkeypatch.setattr(checkpoints, "_CHUNK", 30)
    for place in (0, 30, 99):
        data = bytearray(bytes([2]) * 100)
        data[place] ^= 1
        (run / "checkpoint-2" / "model.bin").write_bytes(data)
        with pytest.raises(CheckpointError, match="its checksum"):
            checkpoints.check_files(run / "checkpoint-2")
    (run / "checkpoint-2" / "model.bin").write_bytes(bytes([2]) * 100)
    checkpoints.check_files(run / "checkpoint-2")


def test_everything_is_on_the_disk_before_the_seal_and_the_seal_before_it_counts(tmp_path, monkeypatch):
    """A power failure leaves no seal beside files of which it says more than the disk has."""
    path, calls = tmp_path / "checkpoint-1", []
    (path / "inside").mkdir(parents=True)
    for name in ("model.bin", "inside/more.bin"):
        (path / name).write_bytes(b"0")
    replace = os.replace
    monkeypatch.setattr("os.replace", lambda old, new: (calls.append(("rename", new.name)), replace(old, new)))
    for module in (durable, checkpoints):
        monkeypatch.setattr(module, "sync", lambda path: calls.append(("sync", path.name)))
    checkpoints.seal(path, {"step": 1})
    sealed = calls.index(("rename", checkpoints.SEAL))
    for name in ("model.bin", "more.bin", "inside", "checkpoint-1"):
        assert ("sync", name) in calls[:sealed]
    assert calls[-1] == ("sync", tmp_path.name)


def test_checkpoints_are_ordered_by_their_step_and_not_by_their_name(tmp_path):
    for name in ("checkpoint-9", "checkpoint-10", "checkpoint-100", "checkpoint-best", "checkpoint-9.old"):
        (tmp_path / name).mkdir()
    names = [path.name for path in checkpoints.checkpoints_of(tmp_path)]
    assert names == ["checkpoint-100", "checkpoint-10", "checkpoint-9"]


@pytest.mark.parametrize(
    ("max_steps", "epochs", "finished"),
    [(5, 1.0, False), (4, 9.0, True), (3, 9.0, True), (-1, 0.5, True), (-1, 0.6, False), (0, 0.5, True)],
)
def test_a_run_is_finished_at_its_last_step_or_epoch(tmp_path, max_steps, epochs, finished):
    (tmp_path / "trainer_state.json").write_text(json.dumps({"global_step": 4, "epoch": 0.5}))
    assert checkpoints.is_finished(tmp_path, max_steps, epochs) is finished


def test_a_fingerprint_knows_where_a_text_ends():
    assert checkpoints.fingerprint(["ab", "c"]) != checkpoints.fingerprint(["a", "bc"])
    assert checkpoints.fingerprint(["a", "b"]) != checkpoints.fingerprint(["b", "a"])
    assert checkpoints.fingerprint(iter(["a", "b"])) == checkpoints.fingerprint(["a", "b"])


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_seal_is_named_and_the_older_checkpoint_taken(run, damage, caplog):
    (run / "checkpoint-2" / checkpoints.SEAL).write_bytes(DAMAGED[damage](whole_seal(run)))
    with caplog.at_level(logging.WARNING):
        assert checkpoints.resolve("latest", run) == run / "checkpoint-1"
    assert f"{run / 'checkpoint-2' / checkpoints.SEAL} is damaged" in caplog.text
    with pytest.raises(CheckpointError, match="is damaged: it is not the seal"):
        checkpoints.resolve(str(run / "checkpoint-2"), run)


def test_every_cut_of_a_seal_is_a_damaged_one(run):
    whole = whole_seal(run)
    for length in range(len(whole)):
        (run / "checkpoint-2" / checkpoints.SEAL).write_bytes(whole[:length])
        with pytest.raises(CheckpointError):
            checkpoints.read_seal(run / "checkpoint-2")


def test_latest_refuses_to_begin_anew_what_has_been_trained(run):
    for path in checkpoints.checkpoints_of(run):
        (path / checkpoints.SEAL).write_bytes(b"")
    assert checkpoints.resolve("latest", run) is None  # nothing logged: a job that was put back into the queue early
    (run / "metrics.jsonl").write_text('{"step": 1}\n')
    for resume_from in ("latest", True):
        with pytest.raises(CheckpointError, match=r"no complete checkpoint, but .* holds steps"):
            checkpoints.resolve(resume_from, run)
    assert checkpoints.resolve("latest_or_new", run) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"settings": {"seed": 2}}, "seed was 1 and is 2"),
        ({"settings": {"delta": 2.0}}, "delta was None and is 2.0"),
        ({"settings": {"reward_funcs": ["a", "b"]}}, r"reward_funcs was \['a'\] and is \['a', 'b'\]"),
        ({"data": "e"}, "data was 'd' and is 'e'"),
        ({"model": "n"}, "model was"),
    ],
)
def test_another_contract_is_refused_unless_the_change_is_asked_for(run, change, message):
    path, current = run / "checkpoint-2", CONTRACT | change
    with pytest.raises(CheckpointError, match=message):
        checkpoints.check_contract(path, current)
    (name,) = change.get("settings", change)
    if name == "model":  # no wish of the user's makes another model fit
        with pytest.raises(CheckpointError, match="resume_allow_changes names model"):
            checkpoints.check_contract(path, current, ["model"])
    else:
        changes = checkpoints.check_contract(path, current, [name])
        assert list(changes) == [name] and changes[name][0] != changes[name][1]


@pytest.mark.parametrize("resume_from", ["newest", "run/checkpoint-77"])
def test_what_is_no_folder_is_refused_with_what_can_be_named(run, resume_from):
    with pytest.raises(CheckpointError, match=f"{resume_from} is no checkpoint: .* Use latest, latest_or_new, or the"):
        checkpoints.resolve(resume_from, run)


@pytest.mark.parametrize("name", ["data", "dtype", "max_steps", "num_train_epochs", "adapter_r", "seed"])
def test_what_is_compared_later_or_not_at_all_may_be_named(run, name):
    """The command looks at a checkpoint before it knows the data, the model's dtype and its adapter."""
    known = {key: value for key, value in CONTRACT["settings"].items() if key != "world_size"}
    assert checkpoints.check_before_loading("latest", run, known, [name]) == run / "checkpoint-2"


def test_what_cannot_be_allowed_is_refused_by_name(run):
    for name in ("world_size", "no_such_setting"):
        with pytest.raises(CheckpointError, match=f"names {name}, which is no setting .* It takes: data, delta"):
            checkpoints.check_contract(run / "checkpoint-2", CONTRACT, [name])
        for resume_from in (None, "latest", "latest_or_new"):  # also where there is no checkpoint yet
            with pytest.raises(CheckpointError, match=f"names {name}, which is no setting"):
                checkpoints.check_before_loading(resume_from, run / "empty", CONTRACT["settings"], [name])
    with pytest.raises(CheckpointError, match=r"Did you mean reward_funcs\?"):
        checkpoints.check_contract(run / "checkpoint-2", CONTRACT, ["reward_func"])


def test_allowing_is_only_advised_where_it_can_be(run):
    for settings, advised in (({"seed": 2}, True), ({"seed": 2, "world_size": 2}, False)):
        with pytest.raises(CheckpointError) as error:
            checkpoints.check_contract(run / "checkpoint-2", CONTRACT | {"settings": settings})
        assert ("resume_allow_changes=seed" in str(error.value)) == advised


def test_what_is_left_of_a_removal_that_was_cut_off_has_no_seal(run, monkeypatch):
    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("shutil.rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        checkpoints.remove(run / "checkpoint-2")
    assert checkpoints.newest_complete(run) == run / "checkpoint-1"
    with pytest.raises(CheckpointError, match="its writing was cut off"):
        checkpoints.read_seal(run / "checkpoint-2")
