"""What a user without a clone has: shipped configs, the demo, and a word about what is not installed."""

import configparser
import importlib.metadata
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import trl_entropy
from trl_entropy import configs, demo
from trl_entropy.__main__ import COMMANDS
from trl_entropy.config.command_line import parse
from trl_entropy.config.shipped import config_path, shipped_configs, shipped_engines

REPOSITORY = Path(__file__).parents[2]
_WITHOUT_TRAINING = """
import runpy, sys
for name in ("torch", "trl", "transformers", "accelerate", "peft", "datasets", "jaxtyping", "psutil"):
    sys.modules[name] = None
def run(*words):
    sys.argv = ["trl-entropy", *words]
    try:
        runpy.run_module("trl_entropy", run_name="__main__", alter_sys=False)
    except SystemExit as end:
        print("END", words[0], end.code)
"""


def without_training(calls):
    """What the calls print where nothing is installed that only training needs."""
    child = subprocess.run(
        [sys.executable, "-c", _WITHOUT_TRAINING + calls], capture_output=True, text=True, check=False, timeout=120
    )
    assert child.returncode == 0 and "Traceback" not in child.stderr, child.stderr
    return child.stdout


def test_the_demo_is_the_quickstart():
    text = (REPOSITORY / "launch" / "quickstart.sh").read_text().replace("\\\n", " ")
    (line,) = (line for line in text.splitlines() if "-m trl_entropy.train" in line)
    words = shlex.split(line.split("-m trl_entropy.train")[1].replace('"$@"', ""))
    assert [word.replace("configs/quickstart.yaml", "quickstart") for word in words] == list(demo.SETTINGS)


def test_the_demo_trains_evaluates_and_reports(monkeypatch, tmp_path, capsys):
    """And a run that is there is renamed."""
    monkeypatch.chdir(tmp_path)
    demo.RUN.mkdir(parents=True)
    called = []
    monkeypatch.setattr(demo, "_run", lambda *words: called.append(words))
    demo.main(["--seed", "1"])
    assert [words[0] for words in called] == ["train", "evaluate", "report"]
    assert called[0][-2:] == ("--seed", "1") and called[0][1:3] == ("--config", "quickstart")
    assert not demo.RUN.exists() and len(list(demo.RUN.parent.glob("quickstart-20*"))) == 1
    with pytest.raises(SystemExit):
        demo.main(["--output_dir", "elsewhere"])


def test_a_shipped_config_is_found_by_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _, args, _ = parse(["--config", "quickstart", "--output_dir", str(tmp_path / "run")])
    assert args.learning_rate == 3e-4 and args.entropy_probe
    assert Path(config_path("quickstart")).read_text() == (REPOSITORY / "configs" / "quickstart.yaml").read_text()
    assert config_path("elsewhere/quickstart.yaml") == "elsewhere/quickstart.yaml"
    (tmp_path / "quickstart").write_text("")  # a file of the user's goes before it
    assert config_path("quickstart") == "quickstart"
    with pytest.raises(
        ValueError, match="no file quickstrat, and the package brings no such config: calculator-agent"
    ):
        config_path("quickstrat")


def test_all_configs_are_shipped(capsys):
    assert set(shipped_configs()) == {path.stem for path in (REPOSITORY / "configs").glob("*.yaml")}
    assert {"cpu", "ddp", "zero3", "fsdp2"} < set(shipped_engines()) and "skypilot" not in shipped_engines()
    configs.main([])
    assert "  quickstart " in capsys.readouterr().out
    configs.main(["zero2"])
    assert Path(capsys.readouterr().out.strip()).name == "zero2.yaml"
    with pytest.raises(SystemExit, match="brings no config 'zero9'"):
        configs.main(["zero9"])


def test_help_works_without_what_training_needs():
    told = without_training("".join(f"run({name!r}, '--help')\n" for name in COMMANDS))
    assert [line for line in told.splitlines() if line.startswith("END")] == [f"END {name} 0" for name in COMMANDS]


def test_what_is_missing_is_named_with_its_extra(tmp_path):
    calls = (
        "run('train', '--config', 'quickstart')\nrun('demo')\nrun('experiment', 'kernel', 'run')\nimport trl_entropy\n"
    )
    calls += "try:\n    trl_entropy.DrGRPOTrainer\nexcept ImportError as error:\n    print('END', error)\n"
    ends = [line for line in without_training(calls).splitlines() if line.startswith("END")]
    assert len(ends) == 4 and all("pip install 'trl_entropy[train]'" in line for line in ends)


def test_runs_are_read_without_what_training_needs(real_run):
    calls = f"from trl_entropy import load_run, view\nrun_ = load_run({str(real_run)!r})\n"
    calls += "print(len(view(run_, 'tokens', step=3)), run_.steps.shape)\n"
    calls += f"run('watch', {str(real_run)!r}, '--once')\nrun('best', {str(real_run)!r})\n"
    told = without_training(calls)
    assert "END" not in told and "(3, " in told


def requirements():
    parser = configparser.ConfigParser()
    parser.read(REPOSITORY / "setup.cfg")
    extras = parser["options.extras_require"]
    return {"": parser["options"]["install_requires"], **{name: extras[name] for name in extras}}


def test_what_is_installed_is_within_the_bounds():
    """The lowest of the base were installed and tried by hand; here, that none excludes what the tests run with."""
    bounds = [line for name in ("", "train") for line in requirements()[name].split("\n") if line]
    assert len(bounds) > 15
    for line in bounds:
        name, lowest = re.fullmatch(r"([\w-]+)(?:\[.*\])?(?:>=([\d.]+))?(?:,<[\d.]+)?", line).groups()
        installed = importlib.metadata.version(name)
        numbers = [[int(part) for part in re.findall(r"\d+", text)[:2]] for text in (installed, lowest or "0")]
        assert numbers[0] >= numbers[1], line


def test_every_extra_is_documented():
    page, package = ((REPOSITORY / name).read_text() for name in ("docs/use/commands.md", "PACKAGE.md"))
    for name in set(requirements()) - {"", "dev", "docs"}:
        assert f"[{name}]" in page and f"`{name}`" in package, name


def test_what_is_exported_stands_on_the_page_of_the_api():
    page = (REPOSITORY / "docs" / "api.md").read_text()
    assert all(f"::: trl_entropy.{name}\n" in page for name in trl_entropy.__all__ if name != "__version__")
    assert all(getattr(trl_entropy, name) is not None for name in trl_entropy.__all__)


def test_the_version_stands_in_one_place():
    text = (REPOSITORY / "setup.cfg").read_text()
    assert "version = attr: trl_entropy.__version__" in text and trl_entropy.__version__ not in text
