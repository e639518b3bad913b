"""Which checkpoints, under which settings, and what counts as done."""

import json
from dataclasses import asdict, replace

import pytest
import yaml
from small_evaluation import CONFIG

from trl_entropy.evaluate import Progress, main, parse
from trl_entropy.evaluation.plan import (
    PROFILES,
    TRANSFORMERS,
    VLLM,
    Job,
    Settings,
    Target,
    difference,
    is_done,
    read_config,
    samplers_used,
    settings_of,
    targets_of,
)
from trl_entropy.runs.directory import CheckpointSummary, RunDirectory


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


def evaluated(run, step, settings, written=None):
    """As though the checkpoint had been evaluated."""
    target = targets_of(run, CONFIG, str(step))[0]
    folder = RunDirectory(run).checkpoint_folder(step)
    folder.mkdir(parents=True)
    entry = {"value": 0.5, "low": None, "high": None}
    summary = dict.fromkeys(CheckpointSummary.__annotations__) | {"step": step, "num_prompts": 1, "seconds": 1.0}
    summary |= {"metrics": dict.fromkeys(("pass@1", "greedy_accuracy", "entropy_mean"), entry)}
    summary |= {"settings": written or asdict(settings), "fingerprint": target.fingerprint()}
    (folder / "summary.json").write_text(json.dumps(summary))
    return target


def test_done_means_these_weights_under_these_settings(run):
    target, settings = targets_of(run, CONFIG, "5")[0], settings_of(CONFIG, PROFILES["quick"])
    assert difference(run, target, settings) == "not evaluated yet"
    evaluated(run, 5, settings)
    assert is_done(run, target, settings)
    assert difference(run, target, replace(settings, num_samples=99)) == "num_samples 8, now 99"
    assert difference(run, target, replace(settings, model={"revision": "v2"})) == "model {}, now {'revision': 'v2'}"
    (run / "checkpoint-5" / "model.safetensors").write_bytes(b"trained again")
    assert difference(run, target, settings) == "other weights"


def test_what_an_older_version_has_evaluated_is_done(run):
    settings = settings_of(CONFIG | {"model_revision": "main"}, PROFILES["quick"])
    older = {name: value for name, value in asdict(settings).items() if name not in ("model", "sampler")}
    assert is_done(run, evaluated(run, 5, settings, older), settings)
    assert not is_done(run, evaluated(run, 10, settings, {"another": "format"}), settings)


def test_the_sampler_of_another_evaluation_counts_if_the_rest_is_the_same(run):
    settings = settings_of(CONFIG, PROFILES["quick"])
    target = evaluated(run, 5, replace(settings, sampler=VLLM))
    assert not is_done(run, target, settings) and is_done(run, target, settings, any_sampler=True)
    assert not is_done(run, target, replace(settings, seed=1), any_sampler=True)
    assert samplers_used(run, settings) == [VLLM] and samplers_used(run, replace(settings, seed=1)) == []
    evaluated(run, 10, replace(settings, sampler=VLLM))
    evaluated(run, 0, settings)
    assert samplers_used(run, settings) == [VLLM, TRANSFORMERS]


@pytest.fixture
def asked(monkeypatch):
    """Steps and settings of the evaluations that are started; none is made."""
    jobs = []
    monkeypatch.setattr("trl_entropy.evaluate.run_job", lambda job, *more: jobs.append(job) or "not made here")
    return jobs


@pytest.fixture
def gpu_with_vllm(monkeypatch):
    monkeypatch.setattr("trl_entropy.evaluate._is_installed", lambda package: True)
    monkeypatch.setattr("trl_entropy.evaluate._has_gpu", lambda: True)


def test_auto_goes_on_with_what_training_has_evaluated_with(run, asked, gpu_with_vllm, capsys):
    config = {name: value for name, value in CONFIG.items() if name != "use_cpu"}
    config |= {"evaluate_checkpoints": "background", "evaluate_profile": "full"}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    evaluated(run, 5, settings_of(config, PROFILES["full"]))
    with pytest.raises(SystemExit, match=r"2 of 2 failed \(steps 0, 10\)"):
        main(["--run", str(run)])
    assert {job.settings.sampler for job in asked} == {TRANSFORMERS} and {
        job.settings.num_samples for job in asked
    } == {16}
    said = capsys.readouterr().out
    assert "2 checkpoints to evaluate, 1 already done" in said and "done again" not in said


def test_what_is_done_again_by_the_users_choice_is_said(run, asked, gpu_with_vllm, capsys):
    (run / "config.yaml").write_text(yaml.safe_dump(CONFIG | {"use_cpu": False}))
    for step in (5, 10):
        evaluated(run, step, settings_of(CONFIG, PROFILES["quick"]))
    with pytest.raises(SystemExit):
        main(["--run", str(run), "--sampler", "vllm"])
    again = "done again, and the former results replaced: step 5, 10 (sampler transformers, now vllm)"
    assert [job.target.step for job in asked] == [0, 5, 10] and again in capsys.readouterr().out


def test_a_first_evaluation_takes_the_fastest_sampler(run, asked, gpu_with_vllm):
    (run / "config.yaml").write_text(yaml.safe_dump(CONFIG | {"use_cpu": False}))
    with pytest.raises(SystemExit):
        main(["--run", str(run)])
    assert {job.settings.sampler for job in asked} == {VLLM}


@pytest.mark.parametrize("config, dtype, model", [
    ({"model_init_kwargs": {"revision": "v2", "dtype": "torch.bfloat16"}}, "bfloat16", {"revision": "v2"}),
    ({"model_init_kwargs": {"revision": "main", "dtype": "float32", "attn_implementation": "eager"}}, "float32", {}),
    ({"model_revision": "v3", "dtype": "float16", "model_init_kwargs": None}, "float16", {"revision": "v3"}),
    ({"model_init_kwargs": {"dtype": "auto"}, "model_config": {"dtype": "bfloat16"}}, "bfloat16", {}),
    ({"trust_remote_code": True, "bf16": True}, "bfloat16", {"trust_remote_code": True}),
    ({"trust_remote_code": False, "model_init_kwargs": {"subfolder": "a"}}, "float32", {"subfolder": "a"}),
])  # fmt: skip
def test_which_model_it_was_and_in_which_dtype(config, dtype, model):
    settings = settings_of(CONFIG | config, PROFILES["quick"])
    assert (settings.dtype, settings.model) == (dtype, model)


@pytest.mark.parametrize("config", [{"load_in_4bit": True}, {"model_init_kwargs": {"quantization_config": "x"}}])
def test_a_quantised_base_is_not_evaluated_in_silence(run, asked, capsys, config):
    (run / "config.yaml").write_text(yaml.safe_dump(CONFIG | {"load_in_8bit": False}))
    with pytest.raises(SystemExit):
        main(["--run", str(run), "--checkpoints", "5"])
    assert "Warning:" not in capsys.readouterr().out
    (run / "config.yaml").write_text(yaml.safe_dump(CONFIG | config))
    with pytest.raises(SystemExit):
        main(["--run", str(run), "--checkpoints", "5"])
    assert "Warning: the run was trained on a quantised base model; it is eval" in capsys.readouterr().out


@pytest.mark.parametrize("files, missing", [
    (["model-00001-of-00002.safetensors"], False), (["adapter_model.safetensors"], False),
    (["pytorch_model.bin"], False), (["optimizer.pt", "training_args.bin", "adapter_config.json"], True), ([], True),
])  # fmt: skip
def test_a_checkpoint_without_weights(tmp_path, files, missing):
    for name in files:
        (tmp_path / name).write_bytes(b"x")
    assert (Target(5, str(tmp_path)).problem() is not None) == missing
    assert Target(5, str(tmp_path / "gone")).problem() == f"there is no folder {tmp_path / 'gone'}"
    assert Target(0, "some/model").problem() is None


def test_a_run_that_does_not_say_its_task(run):
    (run / "config.yaml").write_text("seed: 0\n")
    with pytest.raises(ValueError, match="add `task: word_problems`"):
        read_config(run)
    with pytest.raises(ValueError, match=r"no config\.yaml"):
        read_config(run / "checkpoint-5")


@pytest.mark.parametrize("text, message", [
    ("a: [1", "damaged: while parsing"), ("", "damaged: it holds no settings"), ("- 1", "it holds no settings"),
    (b"task: \xff", "damaged: 'utf-8' codec"), ("task: chess", "task: chess; it must be one of word_problems, gsm8k"),
    ("task: gsm8k\nseed: 0", "max_completion_length: None; it must be"),
    ("task: gsm8k\nmax_completion_length: 9\nseed: x", "seed: x; it must be"),
    ("task: gsm8k\nmax_completion_length: 9\nseed: 0\nreward_funcs: [own]", "there is no 'own'; use tag_pref"),
    ("task: gsm8k\nmax_completion_length: 9\nseed: 0\ndataset_name: /gone.jsonl", "there is no file or folder /gone"),
])  # fmt: skip
def test_a_config_that_cannot_be_read_ends_in_one_line(run, asked, text, message):
    (run / "config.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(SystemExit) as ended:
        main(["--run", str(run)])
    said = str(ended.value)
    assert said.startswith("Error: ") and message in said and "\n" not in said and not asked


def test_a_folder_that_cannot_be_written_to_ends_in_one_line(run, asked):
    (run / "evaluation").write_text("a file")
    with pytest.raises(SystemExit, match=r"^Error: .*File exists.*evaluation") as ended:
        main(["--run", str(run)])
    assert "\n" not in str(ended.value) and not asked


@pytest.mark.parametrize("more", [
    ["--subset-frac", "0"], ["--subset-frac", "2"], ["--num-samples", "0"], ["--device", "gpu"],
    ["--device", "cuda:x"],
])  # fmt: skip
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
