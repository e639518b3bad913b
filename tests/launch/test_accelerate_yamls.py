"""Every accelerate YAML of launch/ means what it says: the launcher it chooses, the processes that really start."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.commands.launch import launch_command, launch_command_parser
from distributed.launching import REPOSITORY, free_port, launch
from torch.distributed import run as torch_launcher

HERE = Path(__file__).parent
YAMLS = {path.stem: path for path in (REPOSITORY / "launch").glob("*.yaml") if path.stem != "skypilot"}
ON_CPU = {  # processes, type, stage
    "cpu": (1, "NO", None),
    "ddp-cpu": (2, "MULTI_CPU", None),
    "zero1-cpu": (2, "DEEPSPEED", 1),
    "zero2-cpu": (2, "DEEPSPEED", 2),
    "zero3-cpu": (2, "DEEPSPEED", 3),
    "fsdp2-cpu": (2, "MULTI_CPU", None),  # what accelerate makes of it, unless the package lets it shard
}
ON_GPU = {"ddp": None, "zero1": 1, "zero2": 2, "zero3": 3, "fsdp2": None}


@pytest.fixture
def resolve(monkeypatch):
    """resolve(engine, *options): what torch's launcher would start on one machine, and its environment."""
    started = []
    monkeypatch.setattr(torch_launcher, "run", lambda args: started.append((args, dict(os.environ))))

    def resolve(engine: str, *options: str):
        command = ["--config_file", str(YAMLS[engine]), "--main_process_port", str(free_port()), *options, "script.py"]
        launch_command(launch_command_parser().parse_args(command))
        args, environment = started.pop()
        config, *_ = torch_launcher.config_from_args(args)
        return config, environment

    return resolve


def test_every_yaml_is_tested():
    assert set(YAMLS) == set(ON_CPU) | set(ON_GPU)


@pytest.mark.parametrize("engine", sorted(YAMLS))
def test_yaml_loads_without_unknown_keys(engine):
    config = load_config_from_file(str(YAMLS[engine]))  # raises on them
    assert isinstance(config, ClusterConfig)
    assert config.mixed_precision == "no"
    assert config.use_cpu == (engine in ON_CPU)


@pytest.mark.parametrize("num_processes", [1, 2, 8])
@pytest.mark.parametrize("engine", sorted(ON_GPU))
def test_number_of_gpus_is_the_one_asked_for(resolve, engine, num_processes):
    options = () if num_processes == 2 else ("--num_processes", str(num_processes))
    config, environment = resolve(engine, *options)
    assert (config.nproc_per_node, config.max_nodes) == (num_processes, 1)
    assert environment.get("ACCELERATE_DEEPSPEED_ZERO_STAGE") == (ON_GPU[engine] and str(ON_GPU[engine]))
    assert environment["ACCELERATE_MIXED_PRECISION"] == "no"
    assert environment.get("FSDP_VERSION", "none") == ("2" if engine == "fsdp2" else "none")


@pytest.mark.parametrize("engine", sorted(ON_GPU))
def test_second_of_two_machines(resolve, engine):
    machines = ("--num_machines", "2", "--num_processes", "16", "--machine_rank", "1", "--main_process_ip", "10.0.0.1")
    config, _ = resolve(engine, *machines, "--main_process_port", "29500")
    assert (config.nproc_per_node, config.min_nodes, config.max_nodes) == (8, 2, 2)
    assert (config.rdzv_backend, config.rdzv_configs["rank"]) == ("static", 1)
    assert config.rdzv_endpoint == "10.0.0.1:29500"


def descriptions(output_dir: Path) -> list[dict]:
    return [json.loads(path.read_text()) for path in sorted(output_dir.glob("rank*.json"))]


@pytest.mark.slow
@pytest.mark.parametrize("engine", sorted(ON_CPU))
def test_processes_that_start(engine, tmp_path):
    result = launch(engine, HERE / "describe_process.py", str(tmp_path), scratch=tmp_path, timeout=120)
    assert result.returncode == 0, result.stdout
    num_processes, distributed_type, stage = ON_CPU[engine]
    common = {"distributed_type": distributed_type, "zero_stage": stage, "device": "cpu"}
    expected = [common | {"num_processes": num_processes, "local_rank": rank} for rank in range(num_processes)]
    assert descriptions(tmp_path) == expected


@pytest.mark.slow
@pytest.mark.parametrize(("seconds_allowed", "stops_by_itself"), [(60, True), (1, False)])
def test_launcher_passes_sigterm_on_and_waits(tmp_path, seconds_allowed, stops_by_itself):
    """The guide and slurm.sbatch signal the launcher, and give the ranks TORCH_ELASTIC_SHUTDOWN_TIMEOUT to save."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(YAMLS["ddp-cpu"])]
    command += ["--num_processes", "1", "--main_process_port", str(free_port())]
    command += [str(HERE / "stop_slowly.py"), str(tmp_path), "4"]
    environment = os.environ | {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(seconds_allowed)}
    launcher = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        while not (tmp_path / "running").exists():
            assert launcher.poll() is None, launcher.stderr.read()
            time.sleep(0.1)
        launcher.send_signal(signal.SIGTERM)
        _, errors = launcher.communicate(timeout=60)
    finally:
        launcher.kill()
    assert (tmp_path / "stopped").exists() == stops_by_itself, errors
    assert launcher.returncode != 0  # so a script must not take it for a failure of training
