"""
Every command in a document is one that there is: programs and scripts exist, and so do their options. What a document
lets a reader run in Python compiles; the first script and the loop are run by `tests/test_documents.py` and
`tests/probes/test_watch_step.py`. `test_commands_run.py` runs the commands.
"""

import dataclasses
import importlib
import re

import pytest
from documented import PAGES, REPOSITORY, documented, words_of
from trl import ModelConfig

from trl_entropy.__main__ import COMMANDS
from trl_entropy.config.dr_grpo import DrGRPOConfig
from trl_entropy.experiment import EXPERIMENTS
from trl_entropy.tasks.arguments import TaskArguments
from trl_entropy.tasks.demonstrations import DemonstrationArguments

_SETTINGS = {
    field.name for one in (DrGRPOConfig, ModelConfig, TaskArguments, DemonstrationArguments)
    for field in dataclasses.fields(one)
} | {"config", "help"}  # fmt: skip

OWN = [words for command in documented() if (words := words_of(command))]
NAMED = sorted({(name, word) for name, *words in OWN for word in words if re.fullmatch(r"--[a-zA-Z][\w-]*", word)})


def test_every_named_command_exists():
    names = {name for name, *_ in OWN}
    assert names - {"COMMAND"} <= {*COMMANDS, "config.document"} and len(NAMED) > 20


@pytest.mark.parametrize("command", sorted({name for name, _ in NAMED if name in COMMANDS}))
def test_every_named_option_exists(command, capsys):
    main = importlib.import_module(f"trl_entropy.{command.replace('-', '_')}").main
    names = [["--help"]] if command != "experiment" else [[one, "--help"] for one in EXPERIMENTS]
    for words in names:
        with pytest.raises(SystemExit):
            main(words)
    known = set(re.findall(r"--([\w-]+)", capsys.readouterr().out))
    known |= _SETTINGS if command in ("train", "doctor", "sft") else set()
    known |= {name.replace("_", "-") for name in known} | {name.replace("-", "_") for name in known}
    missing = [option for name, option in NAMED if name == command and option[2:] not in known]
    assert not missing


def test_every_named_script_exists():
    missing, num = [], 0
    for command in documented():
        for script in re.findall(r"(?:^|\s)(?:bash|python)\s+([\w./-]+\.(?:sh|py))", command):
            num += 1
            if not (REPOSITORY / script).exists():
                missing.append(script)
    assert not missing and num > 10


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_python_compiles(path):
    for code in re.findall(r"^```python\n(.*?)^```", path.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE):
        compile(code, str(path), "exec")


def test_the_readme_is_short():
    assert len((REPOSITORY / "README.md").read_text().splitlines()) <= 120
