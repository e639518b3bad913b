"""What a user types, under every shipped engine: `metrics.jsonl` is that of one process."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from comparing import largest_deviation, rounding_of
from launching import REPOSITORY, free_port, launch

from trl_entropy.runs.directory import RunDirectory

pytestmark = pytest.mark.slow

WORKER = Path(__file__).with_name("replay_module.py")
# Name -> launch/<engine>.yaml, processes, machines.
LAUNCHES = {
    "one process": ("cpu", 1, 1),
    "ddp": ("ddp-cpu", 2, 1),
    "zero1": ("zero1-cpu", 2, 1),
    "zero2": ("zero2-cpu", 2, 1),
    "zero3": ("zero3-cpu", 2, 1),
    "fsdp2": ("fsdp2-cpu", 2, 1),
    "four processes": ("zero2-cpu", 4, 1),
    "two machines": ("ddp-cpu", 2, 2),
}
WITHOUT_KL = ("zero3", "fsdp2")  # it is refused by name there
STEPS = 2
COMMON = {
    "config": REPOSITORY / "configs" / "quickstart.yaml",
    "num_train_problems": 64,
    "reward_funcs": "format_reward",
    "max_completion_length": 16,
    "num_generations": 4,
    "max_steps": STEPS,
    "learning_rate": 1e-2,
    "lr_scheduler_type": "constant",
    "warmup_steps": 0,
    # Not far below the gradients: with 1e-8 a coordinate whose gradient is rounding moves by lr all the same.
    "adam_epsilon": 1e-4,
    "weight_decay": 0.01,
    "probe_batch_size": 4,
    "entropy_probe_every": 1,
    "entropy_probe_completions": "held_out",
    "entropy_probe_num_completions": 16,
    "optimizer_state_probe_every": 1,
    "eval_on_start": False,
    "eval_strategy": "no",
    "save_strategy": "no",
    "log_completions": False,
    "report_to": "none",
}
GRADIENTS = {
    "rows": 16,
    "noise_scale_probe": True,
    "fisher_probe": True,
    "fisher_num_sequences": 16,
}
HELD_OUT = {"entropy_second_order": True, "entropy_placebo": True}
# Between them every probe; `rows` of a micro-batch over all processes.
RUNS = {
    "full": GRADIENTS
    | HELD_OUT
    | {
        "num_prompts_per_step": 8,
        "noise_scale_within_prompt": True,
        "fisher_num_sequences": 32,  # all: fewer would be the first groups of each process
        "mutual_information_probe": True,
        "mutual_information_probe_every": 1,
        "entropy_attribution": "token",
    },
    "full, rollouts": GRADIENTS
    | {"num_prompts_per_step": 4, "entropy_probe_completions": "rollouts", "entropy_probe_num_completions": None},
    "lora": GRADIENTS | HELD_OUT | {"num_prompts_per_step": 4, "use_peft": True},
    # Three groups of four on two or four processes: groups lie across them.
    "split groups": {
        "rows": 12,
        "num_prompts_per_step": 3,
        "length_normalizer": "group_max",
        "entropy_attribution": "sequence",
    },
}


def command_line(name: str, run: str, directory: Path, model_path: str) -> list[str]:
    """Behind `-m trl_entropy.train`."""
    settings = COMMON | {"model_name_or_path": model_path, "output_dir": directory / run} | RUNS[run]
    settings["per_device_train_batch_size"] = settings.pop("rows") // LAUNCHES[name][1]
    settings["kl_every"] = 0 if name in WITHOUT_KL else 1
    return [word for key, value in settings.items() for word in (f"--{key}", str(value))]


@pytest.fixture(scope="module")
def rows_of(tmp_path_factory, model_path):
    """rows_of(launch): `metrics.jsonl` of every run under it; each is launched once."""
    done: dict[str, dict[str, list[dict]]] = {}

    def run(name: str) -> dict[str, list[dict]]:
        if name not in done:
            done[name] = {}  # if the launch fails, the other tests of it fail at once
            directory = tmp_path_factory.mktemp("runs")
            train(name, directory, model_path)
            done[name] = {run: RunDirectory(directory / run).metrics() for run in RUNS}
            for run in RUNS:
                environment = json.loads((directory / run / "environment.json").read_text())
                assert environment["num_processes"] == LAUNCHES[name][1]
        return done[name]

    return run


def train(name: str, directory: Path, model_path: str) -> None:
    """All runs, in one launch; two launchers on this machine stand for two, with the options of launch/README.md."""
    engine, num_processes, num_machines = LAUNCHES[name]
    command_lines = [json.dumps(command_line(name, run, directory, model_path)) for run in RUNS]
    processes = ("--num_processes", str(num_processes))
    machines = ("--num_machines", str(num_machines), "--main_process_ip", "127.0.0.1")
    machines += ("--main_process_port", str(free_port()))

    def machine(rank: int):
        options = processes if num_machines == 1 else (*processes, *machines, "--machine_rank", str(rank))
        return launch(engine, WORKER, *command_lines, scratch=directory / "ops", timeout=280, options=options)

    with ThreadPoolExecutor() as pool:
        for result in map(machine, [0]) if num_machines == 1 else pool.map(machine, range(num_machines)):
            assert result.returncode == 0, result.stdout[-6000:]


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("name", [name for name in LAUNCHES if name != "one process"])
def test_metrics_are_those_of_one_process(rows_of, name, run):
    expected, got = rows_of("one process")[run], rows_of(name)[run]
    assert len(expected) == STEPS
    if name in WITHOUT_KL:
        expected = [{key: value for key, value in row.items() if key != "kl"} for row in expected]
    deviation, key = largest_deviation(expected, got)
    print(f"| {name} | {run} | {len(got[-1])} | {deviation:.1e} | {key} |")
    change = "entropy/delta_in_sample" if "rollouts" in run else "entropy/delta_measured"
    for row in expected:  # there is something to compare: no step stands still
        assert row["grad_norm"] > 0 and row[f"{change}_stderr"] > 100 * rounding_of(row)
