"""The folder of `trl-entropy new`: its own test passes, its config is read, and nothing is written over."""

import subprocess
import sys

import pytest

from trl_entropy.config.command_line import parse
from trl_entropy.new import FILES, main
from trl_entropy.tasks.completion_functions import metric_functions, reward_functions, tried
from trl_entropy.tasks.registry import load_task


def test_the_folder_holds_a_task_that_is_read_and_whose_test_passes(tmp_path, monkeypatch, capsys):
    main([str(tmp_path / "my-task")])
    assert f"next: cd {tmp_path / 'my-task'}" in capsys.readouterr().out
    monkeypatch.chdir(tmp_path / "my-task")
    assert not any("NAME" in (tmp_path / "my-task" / file).read_text() for file in FILES)
    task, args, _ = parse(["--config", "config.yaml"])
    train, test = load_task(task, None, args.seed)
    assert task.task == "dataset" and {*train["prompt"]}.isdisjoint(test["prompt"])
    trials = tried(reward_functions(task) + metric_functions(task), list(train.select(range(3))))
    assert [trial.values for trial in trials] == [[0.0, 0.0, 1.0], [0.0, 4.0, 5.0]]
    ended = subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"], capture_output=True)
    assert ended.returncode == 0, ended.stdout.decode()


def test_what_is_there_is_left_alone(tmp_path):
    (tmp_path / "task.py").write_text("mine")
    with pytest.raises(SystemExit, match=r"has task\.py already; name a folder that has not"):
        main([str(tmp_path)])
    assert [file.name for file in tmp_path.iterdir()] == ["task.py"]
    with pytest.raises(SystemExit, match="is no name for a task"):
        main([str(tmp_path / "a b")])
