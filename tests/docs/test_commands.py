"""
Every command in a document is one that there is: programs and scripts exist, and so do their options. What a document
lets a reader run in Python compiles; the first script and the loop are run by `tests/test_documents.py` and
`tests/probes/test_watch_step.py`, the quickstart's and the notebooks' commands by the tests of these.
"""

import dataclasses
import importlib
import re
from pathlib import Path

import pytest
from trl import ModelConfig

from trl_entropy.__main__ import COMMANDS
from trl_entropy.config.dr_grpo import DrGRPOConfig
from trl_entropy.tasks.arguments import TaskArguments
from trl_entropy.tasks.demonstrations import DemonstrationArguments

REPOSITORY = Path(__file__).parents[2]
PAGES = [*sorted(REPOSITORY.glob("docs/**/*.md")), *sorted(REPOSITORY.glob("*.md")), REPOSITORY / "launch/README.md"]
PAGES = [page for page in PAGES if page.name != "CHANGELOG.md"]  # tells of what was
_SETTINGS = {
    field.name for one in (DrGRPOConfig, ModelConfig, TaskArguments, DemonstrationArguments)
    for field in dataclasses.fields(one)
} | {"config", "help"}  # fmt: skip
_OF_OTHERS = ("--config_file", "--num_processes", "--num_machines", "--machine_rank", "--main_process_ip")


def commands_of(path):
    """What follows `$ ` of each shell: lines of blocks without a language, joined where they go on, and code spans."""
    text = path.read_text(encoding="utf-8")
    blocks = re.findall(r"^```(?:bash)?\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    indented = re.findall(r"^    +(\S.*)$", text, re.MULTILINE)
    spans = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE))
    lines = "\n".join(blocks + indented).replace("\\\n", " ").splitlines()
    return [line.split("#")[0].strip() for line in [*lines, *spans] if "trl" in line or line.startswith("bash ")]


def named_command(line):
    """The command of this package in a line of a shell, and its own options."""
    found = re.search(r"(?:^|\s)(?:trl-entropy |-m trl_entropy\.)([\w-]+)(.*)", line)
    if found is None:
        return None
    options = [option for option in re.findall(r"--[\w-]+", found[2]) if option not in _OF_OTHERS]
    return found[1].replace("_", "-"), options


ALL = [(path, line) for path in PAGES for line in commands_of(path)]
NAMED = sorted({(found[0], option) for _, line in ALL if (found := named_command(line)) for option in found[1]})


def test_every_named_command_exists():
    names = {found[0] for _, line in ALL if (found := named_command(line))}
    assert names - {"COMMAND"} <= {*COMMANDS, "config", "engine", "analysis"} and len(NAMED) > 20


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


EXPERIMENTS = (
    "agreement", "calibration", "claims", "conditioning", "exchange", "influence", "kernel", "linearity", "predictors",
)  # fmt: skip


def test_every_named_script_exists():
    missing, num = [], 0
    for path, line in ALL:
        for script in re.findall(r"(?:^|\s)(?:bash|python)\s+([\w./-]+\.(?:sh|py))", line):
            num += 1
            if not (REPOSITORY / script).exists():
                missing.append((path.name, script))
    assert not missing and num > 10


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_python_compiles(path):
    for code in re.findall(r"^```python\n(.*?)^```", path.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE):
        compile(code, str(path), "exec")


def test_the_readme_is_short():
    assert len((REPOSITORY / "README.md").read_text().splitlines()) <= 120
