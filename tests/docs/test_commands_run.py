"""
Every command of the documents is run, shortened where it takes long (`command_table.HERE`), or is run by another test,
or has a sentence that says why nothing runs it. They are typed in a folder where RUN and `runs/...` are a real run.
"""

import importlib
import json
import re
import runpy
import shlex
import shutil
import sys
from pathlib import Path

import pytest
from command_table import HELP, HERE, REASONS, TESTS, decided, normal
from documented import REPOSITORY, documented

COMMANDS = documented()
# A placeholder of the documents -> what is typed in its place
PLACEHOLDERS = {"CONFIG": "quickstart", "FILE": "configs/quickstart.yaml", "FOLDER": "a-folder", "S": "0"}
RUNS = ("first", "seed0", "calculator-agent", "quickstart-kernel", "qwen2.5-1.5b-gsm8k")
RECORD = json.dumps({"question": "What is 2 + 3?", "answer": "2 + 3 = 5\n#### 5"}) + "\n"


def once(command: str) -> str:
    """What is left of a command without the names of runs and configs, and what is set otherwise to make it short."""
    text = re.sub(r" --(?:output_dir|max_steps|seed|steps) \S+", "", normal(command))
    text = re.sub(r"\bRUN1 RUN2\b", "RUNS", re.sub(rf"\bruns/(?:{'|'.join(RUNS)})\b", "RUN", text))
    text = re.sub(r"\b(?:CONFIG|FILE|configs/quickstart\.yaml)(?= |$)", "quickstart", text)
    return re.sub(r"s3://\S+", "URL", text).replace("my-task", "FOLDER")


# Of commands that would do the same, the first
FIRST = {once(command): command for command in reversed(COMMANDS)}
TYPED = {
    command: found.what for command in FIRST.values()
    if (found := decided(command)) is not None and found.kind in ("here", "help")
}  # fmt: skip


def test_every_command_has_a_test_or_a_reason():
    assert len(COMMANDS) > 150
    without = {command: [path.name for path in paths] for command, paths in COMMANDS.items() if not decided(command)}
    assert not without, "say in tests/docs/command_table.py what is done with these"


def test_no_line_of_the_tables_is_of_a_command_that_is_gone():
    used = {found.pattern for command in COMMANDS if (found := decided(command))}
    assert not [pattern for table in (HERE, HELP, TESTS, REASONS) for pattern in table if pattern not in used]
    assert all(reason.endswith(".") and len(reason.split()) > 4 for reason in REASONS.values())


def test_a_command_without_either_is_noticed():
    assert decided("trl-entropy entangle RUN") is None
    assert decided("trl-entropy train --config another.yaml") is None


def test_the_tests_that_are_named_are_there():
    for name in TESTS.values():
        file, _, test = name.partition("::")
        assert f"def {test}" in (REPOSITORY / "tests" / file).read_text(), name


def test_what_is_given_to_pytest_is_there():
    for command in COMMANDS:
        for path in re.findall(r"-m pytest.* (tests/\S+)", command):
            assert (REPOSITORY / path).exists(), command
            name = re.search(r"-k (\w+)", command)
            assert name is None or name[1] in (REPOSITORY / path).read_text(), command


@pytest.fixture(scope="module")
def folder(tmp_path_factory, real_run, warm_start_dir) -> Path:
    """What a reader has in front of them: a clone, and runs under the names of the documents."""
    clone = tmp_path_factory.mktemp("typed") / "trl_entropy"
    (clone / "runs").mkdir(parents=True)
    for name in ("configs", "launch", "docs", "tests"):
        (clone / name).symlink_to(REPOSITORY / name)
    shutil.copytree(real_run, clone / "RUN")
    for path in [clone / "RUN1", clone / "RUN2", *(clone / "runs" / name for name in RUNS)]:
        path.symlink_to(clone / "RUN")
    data = clone.parent / "shared" / "data" / "gsm8k"  # where configs/gsm8k-embedded.yaml looks
    data.mkdir(parents=True)
    for name in ("train", "test"):
        (data / f"{name}.jsonl").write_text(RECORD * 80)
    return clone


def typed(command: str, more: str, folder: Path) -> list[str]:
    """The words of a command with what makes it short, as a shell would give them."""
    words = [PLACEHOLDERS.get(word, word) for word in shlex.split(f"{normal(command)} {more}")]
    url = f"file://{folder}/archive"
    words = [url if word == "URL" or word.startswith("s3://") else word for word in words]
    words = [str(folder / "made") if word == "DIR" else word for word in words]
    if words[:2] == ["trl-entropy", "train"] and "--help" not in words:
        words += ["--output_dir", str(folder / f"trained-{len(list(folder.glob('trained-*')))}")]
    return words


def run(words: list[str], monkeypatch) -> None:
    """Run it in this process, with the paths that Python would have."""
    program, name, *arguments = words
    if program == "trl-entropy":
        monkeypatch.setattr(sys, "argv", ["trl-entropy", name, *arguments])
        importlib.import_module(f"trl_entropy.{name.replace('-', '_')}").main(arguments)
        return
    if name == "-m":
        name, *arguments = arguments
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        monkeypatch.syspath_prepend(str(REPOSITORY))
        runpy.run_module(name, run_name="__main__", alter_sys=True)
        return
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    monkeypatch.syspath_prepend(str((REPOSITORY / name).parent))
    runpy.run_path(str(REPOSITORY / name), run_name="__main__")


@pytest.mark.slow
@pytest.mark.parametrize("command", TYPED)
def test_it_runs(command, folder, monkeypatch, capfd):
    monkeypatch.chdir(folder)
    try:
        run(typed(command, TYPED[command], folder), monkeypatch)
    except SystemExit as end:
        found_problems = " doctor " in command and end.code == 1  # which is what it is for
        assert end.code in (None, 0) or found_problems, end.code
    told = capfd.readouterr()
    assert told.out.strip() and "Traceback" not in told.out + told.err
