"""`watch_step` in a plain loop on two processes gives the numbers of one."""

import json
import os
import sys
from pathlib import Path

import pytest
from launching import free_port, run_with_deadline
from watch_worker import train

WORKER = Path(__file__).with_name("watch_worker.py")


@pytest.mark.slow
def test_numbers_of_two_processes_are_those_of_one(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    command += ["--master_port", str(free_port()), str(WORKER), str(tmp_path / "numbers.json")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    run = run_with_deadline(command, environment, timeout=240)
    assert run.returncode == 0, run.stdout[-6000:]
    expected, got = train("plain"), json.loads((tmp_path / "numbers.json").read_text())
    assert got.keys() == {"ddp", "fsdp2"}
    for kind, steps in got.items():
        for one, other in zip(expected, steps, strict=True):
            assert one.keys() == other.keys()
            for name, value in one.items():
                assert other[name] == pytest.approx(value, rel=1e-3, abs=3e-6), (kind, name)
        assert abs(steps[-1]["entropy/delta_measured"]) > 1e-4
