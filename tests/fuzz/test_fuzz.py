"""What the fuzz has found stays mended, and a few new cases of each kind end with an exit status and one line."""

import json
import random
import sys
from pathlib import Path

import pytest
from fuzz import cases

CORPUS = sorted((Path(__file__).parent / "corpus").glob("*-*-*"))


@pytest.mark.parametrize("path", CORPUS, ids=lambda path: path.name)
def test_what_was_found_stays_mended(path, request):
    kind, command, _ = path.stem.split("-")
    if kind == "run":
        fault = cases.try_run(command, json.loads(path.read_text()), request.getfixturevalue("real_run"))
    else:
        fault = {"config": cases.try_config, "data": cases.try_data}[kind](command, path.read_bytes())
    assert fault is None, fault


@pytest.mark.parametrize("kind", ["config", "data", "run"])
def test_new_cases_end_in_one_line(kind, request):
    for number in range(12):
        rng = random.Random(f"{kind} in the tests {number}")
        if kind == "run":
            run = request.getfixturevalue("real_run")
            command, case = cases.make_run(rng, run)
            fault = cases.try_run(command if command != "report" else "load", case, run)
        else:
            command, case = (cases.make_config if kind == "config" else cases.make_data)(rng)
            fault = (cases.try_config if kind == "config" else cases.try_data)(command, case)
        assert fault is None, (number, command, case, fault)


def test_the_fuzz_sees_a_traceback_and_more_than_one_line():
    def ends_with(code):
        return lambda: sys.exit(code)

    assert cases.fault_of(ends_with(2)) is None and cases.fault_of(ends_with("Error: one line.")) is None
    assert "not one line" in cases.fault_of(ends_with("Error:\nmore"))
    assert "KeyError: 'prompt'" in cases.fault_of(lambda: {}["prompt"])
