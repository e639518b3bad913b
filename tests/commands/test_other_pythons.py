"""
Python versions beside that of the tests: every file compiles there, and a warning is an error. What the base install
does under them is run by `launch/test-install.sh`, which installs packages.
"""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
_COMPILE = """
import json, pathlib, sys, warnings
warnings.simplefilter("error")
wrong = []
for path in map(pathlib.Path, sys.argv[1:]):
    try:
        compile(path.read_bytes(), str(path), "exec")
    except (SyntaxError, Warning) as error:
        wrong.append(f"{path}: {error}")
print(json.dumps({"version": list(sys.version_info[:2]), "wrong": wrong}))
"""


def interpreter(version: str) -> str:
    """One that starts, on the path or among pyenv's; the test is skipped where there is none."""
    found = [shutil.which(f"python{version}"), *Path.home().glob(f".pyenv/versions/{version}.*/bin/python{version}")]
    for one in filter(None, found):
        if subprocess.run([one, "-c", ""], capture_output=True, check=False).returncode == 0:
            return str(one)
    pytest.skip(f"no python{version} is on this machine")


def compiled(version: str, files: list[Path]) -> list[str]:
    """What of the files does not compile without a warning."""
    words = [interpreter(version), "-c", _COMPILE, *map(str, files)]
    found = json.loads(subprocess.run(words, capture_output=True, text=True, check=True).stdout)
    assert found["version"] == [int(part) for part in version.split(".")]
    return found["wrong"]


@pytest.mark.parametrize("version", ["3.12", "3.13", "3.14"])
def test_every_file_compiles_without_a_warning(version):
    listed = subprocess.run(["git", "ls-files", "*.py"], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    files = [path for name in listed.stdout.split() if (path := REPOSITORY / name).exists()]
    assert len(files) > 300 and compiled(version, files) == []


def test_a_file_with_a_warning_is_noticed(tmp_path):
    (tmp_path / "escape.py").write_text('text = "\\d"\n')
    (tmp_path / "comparison.py").write_text("same = 1 is 1\n")
    assert len(compiled("3.12", [*tmp_path.glob("*.py")])) == 2
