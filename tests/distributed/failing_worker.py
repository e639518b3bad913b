"""Trains with something that raises on rank 1 in the first step, in one event after another.

    accelerate launch --config_file launch/zero2-cpu.yaml tests/distributed/failing_worker.py OUTPUT_DIR SETTINGS_JSON

Importing takes longer than training here: each rank imports once, then forks a process for every event. It leaves
`EVENT.rankN.txt`, what that process printed, and `EVENT.rankN.json`, its exit status and when it ended.
"""

import json
import os
import sys
import time
import traceback
from pathlib import Path

import probe_worker
from rank_script import prepare_rank

RANK = os.environ.get("RANK")
LIVES_ON = "lives on"  # the event in which the process of rank 1 does not end with its exception
SECONDS_TO_LIVE_ON = 10


def train(output_dir: Path, event: str, port: int, settings: dict) -> int:
    """In a process of its own and a process group of its own, without the launcher; returns the exit status."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    try:
        os.environ |= {"MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "False"}
        output = os.open(output_dir / f"{event}.rank{RANK}.txt", os.O_WRONLY | os.O_CREAT)
        os.dup2(output, 1)
        os.dup2(output, 2)
        if event == LIVES_ON:
            from trl_entropy.engine import ranks as symmetry

            symmetry._SECONDS_TO_LEAVE = 1.0
        probe_worker.train(output_dir, event, fails_in=event, **settings)
    except BaseException:
        traceback.print_exc()
        if event == LIVES_ON and RANK == "1":
            time.sleep(SECONDS_TO_LIVE_ON)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)


def main(output_dir: Path, ports: dict[str, int], settings: dict) -> None:
    prepare_rank()
    import trl_entropy.trainer.dr_grpo  # noqa: F401  once, for all

    for event, port in ports.items():
        status = train(output_dir, event, port, settings)
        ended = {"status": status, "time": time.time()}
        (output_dir / f"{event}.rank{RANK}.json").write_text(json.dumps(ended))


if __name__ == "__main__":
    main(Path(sys.argv[1]), **json.loads(sys.argv[2]))
