"""The tests' own launcher leaves nothing behind."""

import os
import subprocess
import sys

import psutil
import pytest
from launching import run_with_deadline

# As the launcher's: a process whose rank is a session of its own.
PARENT = """
import subprocess, sys, time
rank = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
print(rank.pid, flush=True)
time.sleep({seconds})
"""


@pytest.mark.parametrize("seconds", [0, 600], ids=["launcher gone", "launcher there"])
def test_no_process_is_left_at_the_deadline(seconds, capsys):
    command = [sys.executable, "-c", PARENT.format(seconds=seconds)]
    with pytest.raises(subprocess.TimeoutExpired):
        run_with_deadline(command, dict(os.environ), timeout=2)
    rank = int(capsys.readouterr().out)
    assert not psutil.pid_exists(rank) or psutil.Process(rank).status() == psutil.STATUS_ZOMBIE
