"""The estimate of a run's files against the files of a real run of every probe."""

import dataclasses
from pathlib import Path

import pytest
from real_run import REPOSITORY, SETTINGS
from safetensors import safe_open

from trl_entropy.config.command_line import parse
from trl_entropy.preflight.disk import Disk, StepFiles, disk
from trl_entropy.preflight.hardware import this_machine
from trl_entropy.preflight.launch import launch_from_options
from trl_entropy.preflight.plan import Plan
from trl_entropy.preflight.shapes import model_shape

QUICKSTART = f"{REPOSITORY}/configs/quickstart.yaml"
EVERY_PROBE = {
    "entropy_probe_every": 1, "entropy_attribution": "token", "noise_scale_probe": True,
    "fisher_probe": True, "optimizer_state_probe": True,
}  # fmt: skip


def estimated(output_dir: Path, **settings) -> Disk:
    given = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    task, args, model = parse(["--config", QUICKSTART, "--output_dir", str(output_dir), *given])
    launch = launch_from_options(1, None, True)
    return disk(Plan(task, args, model, launch, this_machine(use_cpu=True), model_shape(model)))


def size(paths) -> int:
    return sum(path.stat().st_size for path in paths if path.is_file())


def of_training(run: Path) -> int:
    """All that training left; evaluations and the page are made afterwards."""
    later = ("evaluation", "report")
    return size(path for path in run.rglob("*") if path.relative_to(run).parts[0] not in later)


def test_within_15_percent_of_a_real_run_of_every_probe(real_run, tmp_path):
    found = estimated(tmp_path, **SETTINGS)
    assert found.at_end == pytest.approx(of_training(real_run), rel=0.15)
    assert found.checkpoints.at_end == 1
    assert found.checkpoints.each == pytest.approx(size((real_run / "checkpoint-3").iterdir()), rel=0.15)
    assert found.logs == pytest.approx(
        (real_run / "metrics.jsonl").stat().st_size, rel=0.35
    )  # a probe's first steps log less


@pytest.mark.parametrize("probe", ["entropy", "attribution", "noise_scale", "fisher", "likelihood", "rollouts"])
def test_files_of_a_probe_are_within_15_percent(real_run, tmp_path, probe):
    """For completions as long as those of the step."""
    for step in (2, 3):
        with safe_open(real_run / "probes" / "rollouts" / f"step_{step:06d}.safetensors", "np") as file:
            tokens = file.get_slice("completion_mask").get_shape()[1]
        found = estimated(tmp_path, **(SETTINGS | {"max_completion_length": tokens})).probes
        path = real_run / "probes" / probe / f"step_{step:06d}.safetensors"
        assert found[probe].each == pytest.approx(path.stat().st_size, rel=0.15)
        assert found.keys() == {folder.name for folder in (real_run / "probes").iterdir() if folder.is_dir()}


def test_defaults_keep_a_long_run_below_20_gb(tmp_path):
    """10,000 steps of 1,024 completions of 1,024 tokens; checkpoints are the model's."""
    settings = EVERY_PROBE | {
        "max_steps": 10_000, "per_device_train_batch_size": 1024, "num_prompts_per_step": 128,
        "max_completion_length": 1024, "save_strategy": "no", "report_to": "tensorboard", "log_completions": True,
    }  # fmt: skip
    found = estimated(tmp_path, **settings)
    assert 3e9 < found.at_end < found.at_most < 20e9
    assert found.probes["rollouts"].at_end == found.probes["fisher"].at_end == 158
    for name, most in (("probe_files_keep", 400), ("completions_files_keep", 400)):
        assert estimated(tmp_path, **settings, **{name: most}).at_end > 1.01 * found.at_end


@pytest.mark.parametrize(
    ("keep", "at_most", "at_end"), [(None, 500, 500), (1000, 500, 500), (100, 100, 64), (1, 1, 1)]
)
def test_kept_steps(keep, at_most, at_end):
    assert dataclasses.astuple(StepFiles.kept(7, 1000, 2, keep)) == (7, at_most, at_end)


@pytest.mark.parametrize(("settings", "probes"), [
    ({"probe_files_keep": 0}, set()),
    ({"entropy_probe": False}, set()),
    ({"entropy_probe": False, "fisher_probe": True}, {"fisher", "rollouts"}),
    ({"entropy_probe": False, "mutual_information_probe": True, "mutual_information_num_prompts": 4},
     {"mutual_information", "rollouts"}),
    ({"entropy_probe_completions": "rollouts"}, {"entropy", "rollouts"}),
])  # fmt: skip
def test_only_what_is_written_is_counted(tmp_path, settings, probes):
    off = dict.fromkeys(("noise_scale_probe", "fisher_probe", "likelihood_probe"), False)
    off |= {"entropy_attribution": "none", "entropy_control": "none"}
    if settings.get("entropy_probe", True) is False:
        off.pop("entropy_control")
    found = estimated(tmp_path, **(off | settings), log_completions=False)
    assert set(found.probes) == probes and found.completions.at_most == 0
