"""Starts a script as a user does, `accelerate launch --config_file launch/<engine>.yaml`, with a deadline."""

import contextlib
import os
import socket
import subprocess
import sys
import uuid
from pathlib import Path

import psutil

MARK = "TRL_ENTROPY_TEST_LAUNCH"
REPOSITORY = Path(__file__).parents[2]


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def launch(
    engine: str, script: Path, *args: str, scratch: Path, timeout: float, options: tuple[str, ...] = ()
) -> subprocess.CompletedProcess[str]:
    """Runs `script` under `launch/<engine>.yaml`; nothing that it started is left running at the deadline.

    Args:
        engine: `cpu`, `ddp-cpu`, `zero2-cpu`, ..., or the path of another accelerate YAML.
        scratch: for DeepSpeed's compiled ops, so that no lock of another run is waited for.
        timeout: seconds.
        options: of `accelerate launch`, behind those given here.

    Raises:
        subprocess.TimeoutExpired: with what it had written.
    """
    config = engine if engine.endswith(".yaml") else str(REPOSITORY / "launch" / f"{engine}.yaml")
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", config]
    command += ["--main_process_port", str(free_port()), *options, str(script), *args]
    # Nothing that an outer launcher or another test set may choose the engine.
    environment = {key: value for key, value in os.environ.items() if not key.startswith("ACCELERATE_")}
    environment |= {"OMP_NUM_THREADS": "1", "TORCH_EXTENSIONS_DIR": str(scratch), "HF_HUB_OFFLINE": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)  # pytest has added the folders of the tests
    return run_with_deadline(command, environment, timeout)


def run_with_deadline(
    command: list[str], environment: dict[str, str], timeout: float
) -> subprocess.CompletedProcess[str]:
    """Runs `command`; at the deadline kills it and all its descendants.

    The launcher's ranks are sessions of their own, so that killing its group would leave them; they are found by a
    variable of their environment instead.
    """
    mark = uuid.uuid4().hex
    process = subprocess.Popen(
        command,
        cwd=REPOSITORY,
        env=environment | {MARK: mark},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=timeout)
    except BaseException:  # the deadline, or pytest's own: nothing may keep running
        while found := marked_processes(mark):
            for other in found:
                with contextlib.suppress(psutil.NoSuchProcess):
                    other.kill()
            psutil.wait_procs(found, timeout=5)
        output, _ = process.communicate()
        print(output[-8000:])
        raise
    return subprocess.CompletedProcess(command, process.returncode, output)


def marked_processes(mark: str) -> list[psutil.Process]:
    """Living processes that inherited `mark`."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get(MARK) == mark:
                found.append(process)
    return found
