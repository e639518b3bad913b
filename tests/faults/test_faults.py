"""A few of the faults that harness.py tries by the hundred, and that it sees what is lost."""

import os
import shutil
import subprocess
import sys

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("gcc") is None, reason="gcc compiles the library that makes files fail"),
]


def harness(*arguments):
    command = [sys.executable, "-m", "faults.harness", *arguments]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


@pytest.mark.timeout(900)
def test_no_fault_loses_anything():
    done = harness("--points", "10", "--seed", "20")
    assert done.returncode == 0 and "10 faults" in done.stdout and ": 0 lost something" in done.stdout, done


def test_what_is_lost_is_seen():
    done = harness("--points", "2", "--planted")
    assert (
        done.returncode == 1
        and "2 faults {'archive': 2}, of which 2 ended the command, seed 0: 2 lost something" in done.stdout
    ), done
    assert "the manifest names" in done.stdout
