"""
Every file that a document or a docstring names is there: in documents, notebooks, launchers and the package. The
README's script runs.
"""

import re
import subprocess
from pathlib import Path

from trl_entropy.runs.directory import RunDirectory

REPOSITORY = Path(__file__).parents[1]
_WRITTEN = {".py", ".md", ".ipynb", ".yaml", ".sh", ".sbatch", ".cfg", ".toml"}
# Written between backticks, or as a link's target; `verl/...` is of another project.
_FILE = re.compile(r"`((?!verl/|RUN/)[\w./-]+\.(?:py|md|yaml|sh|ipynb))`|\]\((?!https?:)([\w./-]+\.\w+)(?:#[^)]*)?\)")
_LEFT_BY_A_RUN = {"config.yaml"}


def documents() -> list[Path]:
    listed = subprocess.run(["git", "ls-files"], cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    return [path for name in listed.split() if (path := REPOSITORY / name).suffix in _WRITTEN and path.exists()]


def is_there(name: str, document: Path) -> bool:
    """From the document's own folder or one above it, from the package, or from the tests."""
    roots = [folder for folder in document.parents if folder.is_relative_to(REPOSITORY)]
    return any((root / name).exists() for root in [*roots, REPOSITORY / "trl_entropy", REPOSITORY / "tests"])


def test_named_files_are_there():
    missing, found = [], 0
    for document in documents():
        if document.name in ("CHANGELOG.md", "document.py", Path(__file__).name):  # the second writes into docs/
            continue
        for match in _FILE.finditer(document.read_text(encoding="utf-8")):
            name = match[1] or match[2]
            if name in _LEFT_BY_A_RUN:
                continue
            found += 1
            if not is_there(name, document):
                missing.append(f"{document.relative_to(REPOSITORY)}: {name}")
    assert not missing and found > 50


def test_a_file_that_is_not_there_is_noticed():
    assert not is_there("estimators/adamw.py", REPOSITORY / "docs" / "theory.md")
    assert is_there("estimators/optimizer/adamw.py", REPOSITORY / "docs" / "theory.md")


def python_blocks(name: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (REPOSITORY / name).read_text(encoding="utf-8"), re.DOTALL)


def test_the_readmes_script_runs_as_it_stands(tmp_path, monkeypatch, warm_start_dir, capfd):
    """
    With two steps in the place of its twenty, with the probe of the site, and with what the site then asks of the run.
    """
    (code,), (probe, with_error) = python_blocks("README.md"), python_blocks("docs/use/probe.md")
    same, last_step, parts, _ = python_blocks("docs/use/script.md")
    assert same == code and "max_steps=20" in code and "train_dataset=" in code
    both = "callbacks=[Certainty(), CertaintyWithError()], train_dataset="
    code = f"{probe}\n{with_error}\n{code}".replace("train_dataset=", both)
    monkeypatch.setenv("TRL_ENTROPY_CACHE", str(warm_start_dir.parent))
    monkeypatch.chdir(tmp_path)
    exec(code.replace("max_steps=20", "max_steps=2"), {})
    row, last = RunDirectory(tmp_path / "runs" / "first").metrics()
    assert row["entropy/delta_measured_stderr"] > 0 and last["entropy/delta_measured_stderr"] > 0
    assert 0 < row["reward"] < 1 and 0 < abs(row["my/certainty_change"]) < 0.2
    assert 0 < abs(last["my/certainty_change"]) < 0.2 and 0 < row["my/certainty_change_stderr"] < 0.2
    assert (row["entropy/num_prompts"], last["entropy/num_prompts"]) == (4, 32)  # as the page says
    told = capfd.readouterr()
    assert "building the warm start" not in told.err  # its seed is that of the quickstart
    exec(last_step + parts, {})
    printed = capfd.readouterr().out
    assert f"{last['entropy/delta_measured']} +-" in printed and "num_prompts" in printed
