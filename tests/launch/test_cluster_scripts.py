"""launch/slurm.sbatch with stand-ins for Slurm and accelerate, launch/skypilot.yaml as far as it can be read here."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import yaml
from distributed.launching import REPOSITORY

LAUNCH = REPOSITORY / "launch"
RUN = 'runs/it\'s a "run"'
STAND_INS = {
    # In this process, like a step on one node of two; notes its own options.
    "srun": 'while [[ $1 == -* ]]; do echo "$1" >>srun.log; shift; done; SLURM_NODEID=1 exec "$@"',
    "scontrol": 'case $1 in show) printf "first\\nsecond\\n" ;; *) echo "$*" >>scontrol.log ;; esac',
    # Like training: without SIGTERM it ends well; with it, it saves and the launcher ends with an error.
    "accelerate": r"""save() {
    sleep 0.5
    mkdir "$RUN/checkpoint-3" && touch "$RUN/metrics.jsonl" "$RUN/checkpoint-3/saved"
    exit 1
}
trap save TERM
mkdir -p "$RUN"
printf '%s\n' "$@" >arguments
printf '%s' "${PYTORCH_ALLOC_CONF:-}" >allocator
for _ in $(seq "${TENTHS:-1}"); do sleep 0.1; done""",
}


@pytest.fixture
def start(tmp_path):
    """start(**environment): the batch script in a folder of its own, as Slurm would start it."""
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "activate").touch()
    for name, body in STAND_INS.items():
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/usr/bin/env bash\n{body}\n")
        path.chmod(0o755)
    slurm = {"SLURM_JOB_ID": "123", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "n[1-2]"}
    slurm |= {"SLURM_GPUS_ON_NODE": "8", "RUN": RUN, "PATH": f"{tmp_path}/bin:{os.environ['PATH']}"}
    # launch/test.sh, which may run this test, exports the allocator's setting as launch/environment.sh has it.
    inherited = {name: value for name, value in os.environ.items() if "ALLOC_CONF" not in name}

    def start(*arguments: str, **environment: str) -> subprocess.Popen:
        return subprocess.Popen(
            ["bash", str(LAUNCH / "slurm.sbatch"), RUN, "launch/zero2.yaml", "c.yaml", *arguments],
            cwd=tmp_path,
            env=inherited | slurm | environment,
            stderr=subprocess.PIPE,
            text=True,
        )

    return start


def finish(process: subprocess.Popen) -> int:
    _, errors = process.communicate(timeout=30)
    assert errors == ""
    return process.returncode


def test_job_starts_training_on_every_node(start, tmp_path):
    assert finish(start("--max_steps", "7")) == 0
    assert (tmp_path / "arguments").read_text().splitlines() == [
        *("launch", "--machine_rank", "1", "--config_file", "launch/zero2.yaml"),
        *("--num_machines", "2", "--num_processes", "16"),
        *("--main_process_ip", "first", "--main_process_port", "20123"),
        *("-m", "trl_entropy.train", "--config", "c.yaml", "--output_dir", RUN, "--max_steps", "7"),
    ]
    assert not (tmp_path / "scontrol.log").exists()


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        ({}, "expandable_segments:True"),
        ({"PYTORCH_ALLOC_CONF": "backend:native"}, "backend:native"),
        ({"PYTORCH_CUDA_ALLOC_CONF": "backend:native"}, ""),
    ],
    ids=str,
)
def test_memory_segments_grow_unless_the_user_says_how(start, tmp_path, own, expected):
    assert finish(start(**own)) == 0
    assert (tmp_path / "allocator").read_text() == expected


def test_preempted_job_saves_is_requeued_and_resumes(start, tmp_path):
    job = start(TENTHS="200")
    while not (tmp_path / "arguments").exists():
        time.sleep(0.02)
    job.send_signal(signal.SIGTERM)
    assert finish(job) != 0
    assert (tmp_path / RUN / "checkpoint-3" / "saved").exists()  # waited for, then
    assert (tmp_path / "scontrol.log").read_text() == "requeue 123\n"
    assert finish(start()) == 0
    assert (tmp_path / "arguments").read_text().splitlines()[-2:] == ["--resume_from_checkpoint", "latest_or_new"]


def test_failed_training_fails_the_job(start, tmp_path):
    (tmp_path / "bin" / "accelerate").write_text("#!/usr/bin/env bash\nexit 3\n")
    assert finish(start()) == 3
    assert not (tmp_path / "scontrol.log").exists()


def test_ranks_get_most_of_the_time_between_sigterm_and_the_end():
    text = (LAUNCH / "slurm.sbatch").read_text()
    ahead = int(text.split("--signal=B:TERM@")[1].split()[0])
    waits = int(text.split("TORCH_ELASTIC_SHUTDOWN_TIMEOUT=")[1].split()[0])
    assert 600 <= waits < ahead


@pytest.mark.parametrize("path", sorted(LAUNCH.glob("*.s*")), ids=lambda path: path.name)
def test_shell_scripts_parse(path):
    subprocess.run(["bash", "-n", str(path)], check=True)


def test_skypilot_task_reads_and_names_files_that_exist():
    task = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
    assert set(task) == {"name", "workdir", "resources", "envs", "setup", "run"}
    for part in ("setup", "run"):
        subprocess.run(["bash", "-n"], input=task[part], text=True, check=True)
    for name in ("ENGINE", "SFT_CONFIG", "CONFIG"):
        assert (REPOSITORY / task["envs"][name]).exists()
    assert (
        yaml.safe_load((REPOSITORY / task["envs"]["SFT_CONFIG"]).read_text())["output_dir"] == task["envs"]["SFT_RUN"]
    )


def skypilot_run(tmp_path: Path, **environment: str) -> list[str]:
    """What the task's run section starts, a line a command, with a stand-in for accelerate."""
    task = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
    for path, text in {"bin/accelerate": '#!/usr/bin/env bash\necho "$*" >>log\n', ".venv/bin/activate": ""}.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    (tmp_path / "bin" / "accelerate").chmod(0o755)
    given = {"SKYPILOT_NUM_GPUS_PER_NODE": "2", "PATH": f"{tmp_path}/bin:{os.environ['PATH']}"}
    subprocess.run(
        ["bash", "-c", task["run"]], cwd=tmp_path, env=os.environ | task["envs"] | given | environment, check=True
    )
    return (tmp_path / "log").read_text().splitlines()


def test_skypilot_starts_warm_start_once_then_training(tmp_path):
    sft, train = skypilot_run(tmp_path)
    assert "--num_processes 2 -m trl_entropy.sft" in sft
    assert train.endswith("-m trl_entropy.train --config configs/qwen2.5-1.5b-gsm8k.yaml")
    adapter = tmp_path / "runs" / "sft-qwen2.5-1.5b-gsm8k" / "adapter_config.json"
    adapter.parent.mkdir(parents=True)
    adapter.touch()
    *_, resumed = lines = skypilot_run(tmp_path, RESUME="latest")
    assert len(lines) == 3
    assert resumed.endswith("--resume_from_checkpoint latest")
