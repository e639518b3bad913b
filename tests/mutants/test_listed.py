"""The list of mutants follows the code: what it replaces is there, once, and the tests it names are there."""

import ast
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from mutants.listed import MUTANTS

TESTS = Path(__file__).parents[1]
PACKAGE = TESTS.parent / "trl_entropy"


@pytest.mark.parametrize("file", sorted({mutant.file for mutant in MUTANTS}))
def test_what_a_mutant_replaces_is_there_once_and_another_text_takes_its_place(file):
    text = (PACKAGE / file).read_text()
    for mutant in (one for one in MUTANTS if one.file == file):
        assert text.count(mutant.old) == 1, f"occurs {text.count(mutant.old)} times in {file}: {mutant.old!r}"
        changed = ast.dump(ast.parse(text.replace(mutant.old, mutant.new)))
        assert changed != ast.dump(ast.parse(text)), f"changes nothing in {file}: {mutant.old!r}"


def test_the_tests_that_must_fail_are_there():
    for tests in {mutant.tests for mutant in MUTANTS}:
        file, *name = tests.split("::")
        text = (TESTS / file).read_text()
        assert not name or f"def {name[0].split('[')[0]}(" in text, tests


def test_there_are_a_hundred_and_none_twice():
    assert len(MUTANTS) >= 100
    assert max(Counter((mutant.file, mutant.old, mutant.new) for mutant in MUTANTS).values()) == 1
    folders = Counter(mutant.file.split("/")[0] for mutant in MUTANTS)
    for folder in ("estimators", "runs", "tasks", "control", "trainer", "probes"):
        assert folders[folder] >= 5, folder


@pytest.mark.slow
def test_an_error_is_noticed_by_its_test_and_not_by_another():
    """One real try, with one mutant that is killed and one whose test cannot see it."""
    code = (
        "import sys\n"
        "from mutants import __main__ as tool\n"
        "error = next(one for one in tool.MUTANTS if one.file.endswith('pass_at_k.py'))\n"
        "tool.MUTANTS[:] = [error, error._replace(tests=error.tests + '::test_powers_of_two')]\n"
        "sys.exit(tool.main([]))"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    lines = done.stdout.splitlines()
    assert done.returncode == 1 and [line.split()[1] for line in lines[:2]] == ["killed", "SURVIVED"], done
    assert lines[-1] == "| all | 2 | 1 |"
