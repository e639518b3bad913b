"""What is cut when a run resumes lies beside it, whole, and no reader of the run finds it."""

import contextlib
import os

import pytest

from trl_entropy.runs import checkpoints
from trl_entropy.runs.directory import RunDirectory
from trl_entropy.runs.set_aside import set_aside_after


@pytest.fixture
def run(tmp_path):
    run = RunDirectory(tmp_path / "run")
    for step in (1, 2, 3):
        run.append_metrics(step, {"reward": step / 8})
        run.append_evaluation(step, {"reward": step / 4})
        names = [f"completions/{kind}_{step:05d}.parquet" for kind in ("completions", "evaluation", "dropped")]
        for name in (f"probes/entropy/step_{step:06d}.safetensors", *names):
            (run.path / name).parent.mkdir(parents=True, exist_ok=True)
            (run.path / name).write_text(str(step))
        run.checkpoint_folder(step).mkdir(parents=True)
        (run.path / f"evaluation/step_{step:06d}.log").write_text("a cancelled evaluation")
        (run.path / f"checkpoint-{step}").mkdir()
        (run.path / f"checkpoint-{step}" / "weights").write_text(str(step))
        if step < 3:
            checkpoints.seal(run.path / f"checkpoint-{step}", {"step": step})
    return run


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_later_steps_are_moved_and_earlier_ones_left(run):
    own, *others = run.metrics_path.read_text().splitlines(keepends=True)
    run.metrics_path.write_text('{"step": 1, "added_later": true, "early": 5.0}\n' + own + "".join(others))
    run.append_later(1, {"late": 7.0})
    aside = set_aside_after(run, 1)
    assert aside == run.path / "set_aside" / "after_step_000001_1"
    # What was measured of step 1 when step 2 began is measured again, then with other numbers perhaps.
    assert run.metrics() == [{"step": 1, "reward": 0.125, "early": 5.0}]
    assert [row["step"] for row in run.evaluation()] == [1]
    moved = RunDirectory(aside)
    assert '"late": 7.0' in moved.metrics_path.read_text()
    assert moved.metrics() == [{"step": 2, "reward": 0.25}, {"step": 3, "reward": 0.375}]
    assert [row["reward"] for row in moved.evaluation()] == [0.5, 0.75]
    assert sorted(path.name for path in run.path.glob("probes/entropy/*")) == ["step_000001.safetensors"]
    assert sorted(path.name for path in aside.glob("completions/*")) == [
        f"{name}.parquet"
        for kind in ("completions", "dropped", "evaluation")
        for i in (2, 3)
        for name in [f"{kind}_0000{i}"]
    ]
    assert (aside / "evaluation" / "step_000003").is_dir() and not run.checkpoint_folder(2).exists()
    # The half written checkpoint stays: the resumed run writes over it. An abandoned whole one is no latest.
    assert [path.name for path in checkpoints.checkpoints_of(run.path)] == ["checkpoint-3", "checkpoint-1"]
    assert checkpoints.newest_complete(run.path) == run.path / "checkpoint-1"
    checkpoints.check_files(aside / "checkpoint-2")


def test_nothing_is_lost_and_nothing_is_made_when_nothing_is_later(run):
    before = files(run.path)
    assert set_aside_after(run, 3) is None and files(run.path) == before
    set_aside_after(run, 2)
    set_aside_after(run, 0)
    left = files(run.path)
    assert set(left.values()) >= {b"1", b"2", b"3", b"a cancelled evaluation"}
    assert len([name for name in left if name.endswith(".safetensors")]) == 3


def test_a_kill_at_any_rename_loses_no_line(run, monkeypatch):
    class Killed(BaseException):
        pass

    replace, renames = os.replace, []

    def killing(old, new):
        if len(renames) == allowed:
            raise Killed
        renames.append(new)
        replace(old, new)

    monkeypatch.setattr(os, "replace", killing)
    kills, finished = 0, False
    while not finished:
        allowed = kills % 4
        renames.clear()
        with contextlib.suppress(Killed):
            set_aside_after(run, 1)
            finished = True
        lines = "".join(path.read_text() for path in run.path.rglob("metrics.jsonl"))
        assert all(f'"step": {step}' in lines for step in (1, 2, 3))
        assert {b"1", b"2", b"3"} <= set(files(run.path).values())
        newest = int(checkpoints.newest_complete(run.path).name.split("-")[1])
        logged = [row["step"] for row in run.metrics()]
        assert logged[:newest] == list(range(1, newest + 1))  # of the checkpoint that `latest` takes now
        kills += not finished
    assert kills > 3 and [row["step"] for row in run.metrics()] == [1]
