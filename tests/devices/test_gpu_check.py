"""launch/gpu-check.sh: its script runs without a GPU, says what is wrong in one line, and finds what it looks for."""

import json
import math
import os
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch

from tests.devices import engine_worker, gpu_check, gpu_rows, step_costs
from tests.devices.emulated import EmulatedDevice
from tests.devices.gpu_rows import Verdict, compared
from tests.devices.replayed import CASES, JOINED, build_trainer, smallest_model
from tests.distributed.launching import REPOSITORY
from trl_entropy.probes import PROBES
from trl_entropy.runs.metrics import METRICS

NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
ROW = {"kl": 0.1, "reward": 1.0, "entropy/noise_floor": float("nan")}


def test_numbers_are_compared_and_must_agree():
    assert compared([ROW], [ROW | {"kl": 0.1001}]) == Verdict("ok", "2 numbers, at most 1.0e-03 from the CPU's (kl)")
    assert compared([ROW], [ROW | {"kl": 0.11}]).result == "FAIL"
    assert "other keys: kl" in compared([ROW], [{"reward": 1.0, "entropy/noise_floor": 0.0}]).detail
    assert compared([{"loss": 1.0}], [{"loss": 1.0}]).result == "FAIL"  # nothing was compared


def test_every_compared_number_is_one_that_runs_log():
    assert set(gpu_rows.COMPARED) <= METRICS.keys()


@NO_GPU
def test_without_a_gpu_or_a_package_one_line_says_so(capsys, monkeypatch):
    assert gpu_check.main([]) == 2
    assert capsys.readouterr().out.startswith("gpu-check: torch finds no GPU here.")
    monkeypatch.setattr(gpu_check, "find_spec", lambda name: None if name == "trl" else name)
    assert gpu_check.main(["--device", "cpu"]) == 2
    assert capsys.readouterr().out.startswith("gpu-check: not installed: trl. launch/gpu-check.sh says")


def run_with(monkeypatch, tmp_path, found, *options):
    monkeypatch.setattr(gpu_rows, "checks", lambda device: found)
    status = gpu_check.main(["--device", "cpu", "--output", str(tmp_path), "--only", "row", *options])
    return status, json.loads((tmp_path / "gpu-check.json").read_text()), (tmp_path / "gpu-check.md").read_text()


def no_costs(*args):
    return iter(())


def test_a_failing_row_and_an_exception_end_with_status_1(monkeypatch, tmp_path, capsys):
    def broken():
        raise RuntimeError("two\nlines")

    monkeypatch.setattr(step_costs, "costs", no_costs)
    found = {"row 1": lambda: Verdict("ok", "fine"), "row 2": broken, "another": broken}
    status, report, markdown = run_with(monkeypatch, tmp_path, found)
    assert status == 1
    assert [row["result"] for row in report["checks"]] == ["ok", "FAIL"]
    assert "| row 2 | FAIL | RuntimeError: two lines | 0 |" in markdown
    assert f"torch {torch.__version__}" in markdown
    assert "FAIL  row 2" in capsys.readouterr().out


def test_what_was_found_stays_if_the_run_is_cut_off(monkeypatch, tmp_path):
    def cut_off():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_with(monkeypatch, tmp_path, {"row 1": lambda: Verdict("ok", "fine"), "row 2": cut_off})
    assert "| row 1 | ok | fine | 0 |" in (tmp_path / "gpu-check.md").read_text()


def test_rows_that_would_begin_too_late_are_skipped(monkeypatch, tmp_path):
    monkeypatch.setattr(step_costs, "costs", no_costs)
    status, report, _ = run_with(monkeypatch, tmp_path, {"row": lambda: Verdict("ok", "")}, "--minutes", "0")
    assert status == 0 and report["checks"][0]["found"] == "no time is left"


def test_costs_are_measured_between_steps_without_any(monkeypatch):
    seconds = dict.fromkeys(step_costs.COSTS, 3.0)
    without = iter(range(1, 100))

    def measured(device, settings):
        name = next((name for name, known in step_costs.COSTS.items() if known is settings), None)
        return (float(next(without)) if name is None else seconds[name]), 5.0

    monkeypatch.setattr(step_costs, "_measured", measured)
    rows = list(step_costs.costs("cpu", time.monotonic() + 100))
    assert [row.name for row in rows] == [step_costs.NOTHING, *step_costs.COSTS]
    assert [row.seconds_without for row in rows[:5]] == [1.0, 1.5, 1.5, 1.5, 2.5]
    assert step_costs.table(rows)[3] == f"| {rows[1].name} | 3.00 | 1.50 | 2.00 | 5.0 |"
    late = list(step_costs.costs("cpu", time.monotonic() - 1))
    assert [row.name for row in late] == [step_costs.NOTHING]


def test_a_cost_that_cannot_be_measured_is_named_and_the_others_stay(monkeypatch, tmp_path, capsys):
    def measured(device, settings):
        if settings.get("fisher_probe"):
            raise torch.OutOfMemoryError("CUDA out of\nmemory")
        return 1.0, math.nan

    monkeypatch.setattr(step_costs, "_measured", measured)
    status, report, markdown = run_with(monkeypatch, tmp_path, {}, "--only", "_probe")
    assert status == 1
    assert "| `fisher_probe`, 32 completions | OutOfMemoryError: CUDA out of memory | | | |" in markdown
    assert {cost["seconds"] for cost in report["costs"]} == {1.0, None} and len(report["costs"]) > 5
    assert "FAIL  cost of `fisher_probe`" in capsys.readouterr().out


def test_every_toggle_and_control_has_a_row():
    for rows in (CASES, JOINED, step_costs.COSTS):
        on = {name for settings in rows.values() for name, value in settings.items() if value}
        assert on >= PROBES.keys() | {"entropy_control", "token_control"}


def test_a_check_of_the_device_fails_where_a_probe_changes_training(monkeypatch):
    drawn = []

    def train(folder, use_cpu, **settings):
        drawn.append(settings)
        return torch.tensor([float("learning_rate" in settings), float("fisher_probe" in settings)]), []

    monkeypatch.setattr(gpu_rows, "train", train)
    assert gpu_rows.checks("cpu")["probes leave training as it is, bit for bit"]().result == "FAIL"
    assert len(drawn) == 4


def worker_under(monkeypatch, started):
    def train():
        raise NotImplementedError("training with FSDP is not supported; use one process")

    monkeypatch.setattr(engine_worker, "build_trainer", lambda *args, **settings: SimpleNamespace(train=train))
    monkeypatch.setattr(engine_worker, "engine_of", lambda trainer: started)


def test_an_engine_that_the_package_refuses_is_no_failure_but_another_engine_is(monkeypatch):
    worker_under(monkeypatch, "fsdp2")
    refused = Verdict("refused", "training with FSDP is not supported; use one process")
    assert engine_worker.verdict("cuda", "fsdp2") == refused
    worker_under(monkeypatch, "no")
    assert engine_worker.verdict("cuda", "zero2") == Verdict("FAIL", "accelerate has started no in its place")
    assert engine_worker.verdict("cpu", "fsdp2").result == "skipped"


@pytest.fixture
def emulated_gpu(monkeypatch):
    """An emulated device that passes for a GPU; in float32, as TRL's loss calls kernels for bf16 that a CPU lacks."""

    def in_float32(*args, **settings):
        return build_trainer(*args, **(settings | {"bf16": False}))

    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 2**31)
    monkeypatch.setattr(step_costs, "build_trainer", in_float32)
    monkeypatch.setattr(step_costs, "_random_model", lambda device: smallest_model().to(device))
    with EmulatedDevice() as device:
        yield device


@pytest.mark.slow
@pytest.mark.parametrize("name", ["evaluation", "out of memory, planted"])
def test_rows_on_an_emulated_gpu(name, emulated_gpu):
    assert gpu_rows.checks("cuda")[name]().result == "ok"
    assert emulated_gpu.copies


@pytest.mark.slow
def test_costs_on_an_emulated_gpu(emulated_gpu):
    name = "`entropy_attribution: token`"
    rows = list(step_costs.costs("cuda", time.monotonic() + 100, name))
    assert [(row.name, row.peak) for row in rows] == [(step_costs.NOTHING, 2.0), (name, 2.0)]
    assert emulated_gpu.copies


def run_script(folder, *options):
    """launch/gpu-check.sh with this Python; its exit status, checks by result, and names of costs."""
    command = ["bash", "launch/gpu-check.sh", "--output", str(folder), *options]
    environment = os.environ | {"PYTHON": sys.executable, "WHEELS": str(folder)}
    environment.setdefault("TORCH_EXTENSIONS_DIR", str(folder / "ops"))
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    print(done.stdout, done.stderr[-4000:])
    report = json.loads((folder / "gpu-check.json").read_text())
    results = {row["check"]: row["result"] for row in report["checks"]}
    return done.returncode, results, [cost["name"] for cost in report["costs"]]


@pytest.mark.slow
@pytest.mark.timeout(1200)  # DeepSpeed compiles, which takes a minute or two alone on a machine
def test_whole_script_runs_without_a_gpu(tmp_path):
    status, results, costs = run_script(tmp_path, "--device", "cpu", "--minutes", "20")
    assert results.pop("out of memory, real") == "skipped"
    assert set(results.values()) == {"ok"}
    assert costs == [step_costs.NOTHING, *step_costs.COSTS]
    assert status == 0


@pytest.mark.gpu
@NEEDS_GPU
@pytest.mark.timeout(700)
def test_whole_script_passes_on_the_gpu(tmp_path):
    status, results, costs = run_script(tmp_path)
    assert "FAIL" not in results.values() and costs
    assert status == 0
