"""Which checkpoints, under which settings, and what counts as done."""

import json
from dataclasses import asdict, replace

import pytest
import yaml
from small_evaluation import CONFIG

from trl_entropy.evaluate import Progress, parse
from trl_entropy.evaluation.plan import (
    PROFILES,
    Job,
    Settings,
    Target,
    is_done,
    read_config,
    settings_of,
    targets_of,
)
from trl_entropy.runs.directory import RunDirectory


@pytest.fixture
def run(tmp_path):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    for step in (5, 10):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "model.safetensors").write_bytes(b"weights %d" % step)
    return tmp_path


@pytest.mark.parametrize("which, steps", [("all", [0, 5, 10]), ("latest", [10]), ("10,0", [0, 10]), ("5", [5])])
def test_checkpoints_by_name(run, which, steps):
    assert [target.step for target in targets_of(run, CONFIG, which)] == steps


@pytest.mark.parametrize("which, message", [("7", "no checkpoint of step 7; it has 0, 5, 10"), ("last", "use all")])
def test_checkpoints_that_there_are_not(run, which, message):
    with pytest.raises(ValueError, match=message):
        targets_of(run, CONFIG, which)


def test_the_start_policy_is_the_embedded_one_or_the_configs(run):
    assert targets_of(run, CONFIG, "0")[0].model == "embedded"
    assert targets_of(run, CONFIG | {"model_name_or_path": "some/model"}, "0")[0].model == "some/model"


def test_how_many_problems():
    quick, full = (settings_of(CONFIG, PROFILES[name]) for name in ("quick", "full"))
    assert (quick.num_of(1500), quick.num_of(40), full.num_of(1500)) == (64, 40, 1500)
    share = settings_of(CONFIG, PROFILES["quick"], subset_frac=0.02)
    assert (share.num_of(1500), share.num_of(10), share.num_problems) == (30, 1, None)


def test_the_sampler_is_the_runs_own():
    settings = settings_of(CONFIG | {"top_p": 0.9, "generation_kwargs": {"top_k": 5}}, PROFILES["quick"])
    assert settings.sampling["temperature"] == 0.7 and settings.sampling["top_p"] == 0.9
    assert settings.sampling["top_k"] == 5 and settings.max_completion_length == 12


def test_a_job_survives_its_journey():
    job = Job(Target(5, "x"), settings_of(CONFIG, PROFILES["quick"]), "out", 8, "cpu")
    assert Job.from_json(job.to_json()) == job and isinstance(job.settings, Settings)


def test_done_means_these_weights_under_these_settings(run):
    target, settings = targets_of(run, CONFIG, "5")[0], settings_of(CONFIG, PROFILES["quick"])
    assert not is_done(run, target, settings)
    folder = RunDirectory(run).checkpoint_folder(5)
    folder.mkdir(parents=True)
    summary = {"step": 5, "settings": asdict(settings), "fingerprint": target.fingerprint()}
    (folder / "summary.json").write_text(json.dumps(summary))
    assert is_done(run, target, settings)
    assert not is_done(run, target, replace(settings, num_samples=99))
    (run / "checkpoint-5" / "model.safetensors").write_bytes(b"trained again")
    assert not is_done(run, target, settings)


def test_a_run_that_does_not_say_its_task(run):
    (run / "config.yaml").write_text("seed: 0\n")
    with pytest.raises(ValueError, match="add `task: word_problems`"):
        read_config(run)
    with pytest.raises(ValueError, match=r"no config\.yaml"):
        read_config(run / "checkpoint-5")


@pytest.mark.parametrize("more", [["--subset-frac", "0"], ["--subset-frac", "2"], ["--num-samples", "0"]])
def test_settings_out_of_range(more, capsys):
    with pytest.raises(SystemExit):
        parse(["--run", "x", *more])
    assert more[0] in capsys.readouterr().err


def test_the_time_left_is_that_of_the_checkpoints_left(monkeypatch):
    progress = Progress(4)
    progress.start -= 100
    progress.num_done = 1
    assert progress.left(0.0) == "about 5 min left" and progress.left(0.25) == "about 4 min left"
    progress.num_done = 4
    assert progress.left_after() == ""
