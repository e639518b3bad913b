"""The entry point as a user starts it: errors before anything is loaded, ten steps on each task, SIGTERM."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from trl_entropy.config.command_line import parse, parse_sft
from trl_entropy.config.resume_contract import contract_settings
from trl_entropy.doctor import main as doctor_main
from trl_entropy.evaluation.plan import PROFILES, settings_of
from trl_entropy.models.loading import model_settings
from trl_entropy.runs import checkpoints
from trl_entropy.runs.directory import RunDirectory
from trl_entropy.train import _say_end, _say_start, load_policy, main, tokenizer_of

REPOSITORY = Path(__file__).parents[2]
CONFIGS = sorted((REPOSITORY / "configs").glob("*.yaml"))
GSM8K = REPOSITORY.parent / "shared" / "data" / "gsm8k"
SMALL = ["--num_prompts_per_step", "2", "--per_device_train_batch_size", "8", "--num_generations", "4",
         "--num_eval_problems", "8", "--per_device_eval_batch_size", "8", "--num_generations_eval", "1",
         "--report_to", "none"]  # fmt: skip


def settings(config: Path, directory, *more: str) -> list[str]:
    return ["--config", str(config), "--output_dir", str(directory), *SMALL, *more]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_config_is_read(path, tmp_path):
    text = path.read_text()
    assert text.startswith("# ") and "# Hardware:" in text and "# Start:" in text
    given = yaml.safe_load(text)
    fine_tuning = path.name.startswith("sft-")
    read = parse_sft if fine_tuning else parse
    more = ["--use_vllm", "False"] if "server" in path.name else []  # refused on a CPU
    task, args, model = read(["--config", str(path), "--output_dir", str(tmp_path), "--use_cpu", "True", *more])
    assert args.learning_rate == given["learning_rate"] and task.task == given["task"]
    command = "trl_entropy.sft" if fine_tuning else "trl_entropy.train"
    assert f"-m {command} --config configs/{path.name}" in text
    assert fine_tuning or (model.lora_dropout == 0 and args.truncated_sampling() == "")


@pytest.mark.parametrize("script", ["quickstart.sh", "smollm2.sh"])
def test_what_the_scripts_start_is_read(script, tmp_path, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    text = (REPOSITORY / "launch" / script).read_text().replace("\\\n", " ")
    (line,) = (line for line in text.splitlines() if "-m trl_entropy.train" in line)
    _, arguments = line.split("-m trl_entropy.train")
    _, args, _ = parse([*shlex.split(arguments.replace('"$@"', "")), "--output_dir", str(tmp_path)])
    assert {"entropy_probe", "noise_scale_probe", "fisher_probe"} <= set(args.enabled_probes())
    assert args.entropy_attribution != "none"


def test_the_start_line_names_what_changes_the_step(tmp_path, caplog):
    control = ["--entropy_control", "hold", "--entropy_control_target", "0.2", "--max_steps", "1"]
    caplog.set_level("INFO", "trl_entropy")
    for more in ([], control):
        _, args, _ = parse(settings(REPOSITORY / "configs" / "quickstart.yaml", tmp_path, *more))
        _say_start(SimpleNamespace(args=args, accelerator=SimpleNamespace(num_processes=1, device="cpu")))
    without, held = (line for line in caplog.messages if line.startswith("Dr-GRPO"))
    assert "budget" not in without and held.endswith("; entropy_control: hold")


def test_the_end_of_a_training_is_no_failure_without_a_page_or_an_entropy(tmp_path, caplog, capsys):
    run = RunDirectory(tmp_path)
    for step in (0, 5):
        run.append_evaluation(step, {"reward": 0.5, "entropy": None})
    _say_end(SimpleNamespace(args=SimpleNamespace(output_dir=str(tmp_path)), _logs={"completion": []}))
    assert "held out after step   5: reward 0.500, entropy nan nats/token" in capsys.readouterr().out
    (message,) = caplog.messages
    assert message.startswith(f"The page of {tmp_path} is left out: ") and "metrics.jsonl" in message


@pytest.mark.parametrize("more, said", [
    (["--max_steps", "1", "--num_prompts_per_step", "1", "--per_device_train_batch_size", "4", "--entropy_probe",
      "False"],
     "Dr-GRPO: 1 step of 1 prompt x 4 completions on 1 process, cpu"),
    (["--max_steps", "7"], "Dr-GRPO: 7 steps of 2 prompts x 4 completions"),
    (["--max_steps", "-1", "--num_train_epochs", "3"], "Dr-GRPO: 3 epochs in steps of 2 prompts x 4 completions"),
    (["--max_steps", "-1", "--num_train_epochs", "0.5"], "Dr-GRPO: 0.5 epochs in steps of 2 prompts"),
    (["--additional_steps", "5", "--resume_from_checkpoint", "latest"], "Dr-GRPO: 5 more steps of 2 prompts"),
])  # fmt: skip
def test_the_start_line_says_how_long_the_run_is(tmp_path, caplog, more, said):
    caplog.set_level("INFO", "trl_entropy")
    _, args, _ = parse(settings(REPOSITORY / "configs" / "quickstart.yaml", tmp_path, *more))
    _say_start(SimpleNamespace(args=args, accelerator=SimpleNamespace(num_processes=1, device="cpu")))
    assert caplog.messages[-1].startswith(said)


def test_the_end_of_a_training_names_the_page(tmp_path, capsys):
    RunDirectory(tmp_path).append_metrics(1, {"reward": 0.5})
    _say_end(SimpleNamespace(args=SimpleNamespace(output_dir=str(tmp_path)), _logs={"completion": []}))
    report = tmp_path / "report"
    named = [f"figure  {report / 'training.png'}", f"page    {report / 'index.html'}"]
    assert capsys.readouterr().out.splitlines() == [f"metrics {tmp_path / 'metrics.jsonl'}", *named]
    assert (report / "index.html").is_file() and (report / "training.png").is_file()


LINE = json.dumps({"question": "How many?", "answer": "#### %s"}) + "\n"


@pytest.mark.parametrize("more, files, message", [
    (["--num_eval_problems", "0"], {}, "num_eval_problems is 0; use 1 or more.*eval_strategy=no"),
    (["--num_train_problems", "1"], {}, "num_train_problems is 1, but a step draws 2 different prompts"),
    (["--dataset_name", "data/gsm8k"], {}, "dataset_name is 'data/gsm8k', but nothing reads it: task is"),
    (["--task", "gsm8k", "--dataset_name", "data/gsm8k"], {}, "there is no file or folder data/gsm8k"),
    (["--task", "gsm8k", "--dataset_name", "."], {"train.jsonl": LINE % 5}, "no file or folder test.jsonl"),
    (["--task", "gsm8k", "--dataset_name", "d.jsonl"], {"d.jsonl": LINE % "1,5"}, "d.jsonl, line 1: the answer must"),
    (["--task", "gsm8k", "--dataset_name", "d.jsonl"], {"d.jsonl": LINE % 5}, r"train_dataset has 1 prompt[,;. ]"),
    (["--task", "gsm8k", "--dataset_name", "d.jsonl", "--max_prompt_length", "9"], {"d.jsonl": (LINE % 5) * 4},
     "no prompt of 4 fits into max_prompt_length=9"),
    (["--output_dir", "d.jsonl/run"], {"d.jsonl": ""}, "output_dir is d.jsonl/run, but .*d.jsonl is a file. Choose"),
    (["--model_name_or_path", "nobody/nothing"], {}, "nobody/nothing"),
    (["--max_steps", "0"], {}, "max_steps is 0.*use 1 or more, or -1 for epochs"),
    (["--reward_weights", "1", "2"], {}, r"reward_weights has 2 numbers, reward_funcs 1"),
])  # fmt: skip
def test_a_mistake_ends_in_one_line_before_a_model_is_loaded(tmp_path, more, files, message, monkeypatch):
    monkeypatch.setattr(
        "trl_entropy.models.warm_start.warm_start", lambda *a, **k: pytest.fail("a model was about to load")
    )
    monkeypatch.chdir(tmp_path)
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(SystemExit) as end:
        main(settings(REPOSITORY / "configs" / "quickstart.yaml", "run", *more))
    assert re.search(message, str(end.value)), end.value
    assert str(end.value).startswith("Error") and "\n" not in str(end.value)


@pytest.mark.parametrize("more, message", [
    (["--reward_funcs", "tag_prefer"], "there is no .tag_prefer.; is tag_pref meant"),
    (["--use_peft", "--lora_dropout", "0.1"], "lora_dropout is 0.1.*Set lora_dropout=0"),
    (["--entropy_probe", "True", "--top_k", "50"], "entropy_probe: .*top_k=50 changes it.*Set top_k=0"),
    (["--entropy_probe", "True", "--mask_truncated_completions", "True"], "mask_truncated_completions=True drops"),
    (["--entropy_probe_completions", "held_out", "--entropy_probe_num_completions", "3"],
     "entropy_probe_num_completions is 3.*Try .*_num_completions=4"),
])  # fmt: skip
def test_errors_come_before_anything_is_loaded(tmp_path, more, message, monkeypatch):
    monkeypatch.setattr(
        "trl_entropy.models.warm_start.warm_start", lambda *a, **k: pytest.fail("a model was about to load")
    )
    with pytest.raises(SystemExit) as error:
        main(settings(REPOSITORY / "configs" / "quickstart.yaml", tmp_path, *more))
    assert re.search(message, str(error.value)), error.value
    assert not list(tmp_path.iterdir())


def test_a_run_is_not_written_over(tmp_path):
    RunDirectory(tmp_path).append_metrics(1, {"loss": 0.0})
    with pytest.raises(SystemExit, match="already holds a run"):
        main(settings(REPOSITORY / "configs" / "quickstart.yaml", tmp_path))


def test_a_finished_run_is_left_alone_before_a_model_is_loaded(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("trl_entropy.train.build_trainer", lambda *a, **k: pytest.fail("a model was about to load"))
    given = settings(REPOSITORY / "configs" / "quickstart.yaml", tmp_path, "--max_steps", "4")
    _, args, _ = parse(given)
    checkpoint = tmp_path / "checkpoint-4"
    checkpoint.mkdir(parents=True)
    (checkpoint / "trainer_state.json").write_text(json.dumps({"global_step": 4, "epoch": 0.5}))
    checkpoints.seal(checkpoint, {"step": 4, "settings": contract_settings(args)})
    files = sorted(tmp_path.rglob("*"))
    main([*given, "--resume_from_checkpoint", "latest"])  # no SystemExit: exit status 0
    assert f"{tmp_path} is already finished: checkpoint-4 is its last step" in capsys.readouterr().out
    assert sorted(tmp_path.rglob("*")) == files
    with pytest.raises(pytest.fail.Exception, match="about to load"):
        main([*given, "--resume_from_checkpoint", "latest", "--additional_steps", "1"])


@pytest.mark.parametrize("command, rank, times", [(main, "0", 1), (main, "1", 0), (doctor_main, "0", 1)])
def test_a_damaged_checkpoint_is_named_once_however_often_it_is_looked_at(
    tmp_path, monkeypatch, caplog, command, rank, times
):
    def build_trainer(task, args, model):
        assert checkpoints.resolve(args.resume_from_checkpoint, tmp_path) is None  # as the trainer does
        raise ValueError("built")

    monkeypatch.setattr("trl_entropy.train.build_trainer", build_trainer)
    monkeypatch.setenv("RANK", rank)
    (tmp_path / "checkpoint-4").mkdir()
    given = settings(REPOSITORY / "configs" / "quickstart.yaml", tmp_path, "--resume_from_checkpoint", "latest_or_new")
    for _ in range(2):  # a second command says it again
        caplog.clear()
        with pytest.raises(SystemExit):
            command(given)
        for said in ("checkpoint-4 has no checkpoint_complete.json", "starting from the beginning"):
            assert len([message for message in caplog.messages if said in message]) == times


def test_a_disk_that_is_full_while_logging_is_one_clear_line(tmp_path, warm_start_dir, monkeypatch):
    monkeypatch.setenv("TRL_ENTROPY_CACHE", str(warm_start_dir.parent))
    append = RunDirectory.append_metrics

    def full(self, step, scalars):
        if step == 3:
            raise OSError(28, "No space left on device", "metrics.jsonl")
        append(self, step, scalars)

    monkeypatch.setattr(RunDirectory, "append_metrics", full)
    more = ["--max_steps", "4", "--save_steps", "1", "--entropy_probe", "False", "--eval_strategy", "no"]
    more += ["--eval_on_start", "False", "--disable_tqdm", "True"]
    with pytest.raises(SystemExit) as stop:
        main(settings(REPOSITORY / "configs" / "quickstart.yaml", tmp_path, *more))
    message = str(stop.value)
    assert "No space left on device: 'metrics.jsonl'" in message and "\n" not in message
    assert (
        f"{tmp_path / 'checkpoint-2'} is complete: make room on the disk, then --resume_from_checkpoint latest"
        in message
    )
    assert [row["step"] for row in RunDirectory(tmp_path).metrics()] == [1, 2]


def launch(arguments: list[str], warm_start_dir: Path) -> subprocess.Popen:
    environment = os.environ | {"TRL_ENTROPY_CACHE": str(warm_start_dir.parent), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "launch/cpu.yaml"]
    command += ["-m", "trl_entropy.train", *arguments]
    return subprocess.Popen(
        command, cwd=REPOSITORY, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        start_new_session=True,
    )  # fmt: skip


def test_ten_steps_of_the_quickstart(tmp_path, warm_start_dir):
    arguments = settings(
        REPOSITORY / "configs" / "quickstart.yaml", tmp_path, "--max_steps",
        "10", "--report_to", "tensorboard",
    )  # fmt: skip
    process = launch(arguments, warm_start_dir)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    run = RunDirectory(tmp_path)
    rows = run.metrics()
    assert [row["step"] for row in rows] == list(range(1, 11))
    assert [row["step"] for row in rows if "entropy/delta_measured" in row] == [5, 10]
    assert all(0 < row["entropy/policy"] < 1 for row in rows)
    assert [row["step"] for row in run.evaluation()] == [0, 10]  # before and after
    assert (tmp_path / "report" / "training.png").stat().st_size > 10_000
    assert list((tmp_path / "tensorboard").glob("events*")) and list((tmp_path / "completions").glob("*.parquet"))
    assert json.loads((tmp_path / "environment.json").read_text())["num_processes"] == 1
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["num_prompts_per_step"] == 2
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["task"] == "word_problems"
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["model_revision"] == "main"  # for the evaluation
    assert "'loss'" not in output and "held out" in output  # a line a person can follow, no dictionary a step


def test_the_tokenizer_is_of_the_models_revision_and_evaluation_reads_it(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", lambda name, **how: asked.append((name, how)))
    more = ["--model_name_or_path", "some/model", "--model_revision", "v2", "--dtype", "bfloat16"]
    config = REPOSITORY / "configs" / "quickstart.yaml"
    task, args, model = parse(settings(config, tmp_path, *more, "--model_init_kwargs", '{"subfolder": "a"}'))
    tokenizer_of(args, model)
    load_policy(args, model)
    assert [name for name, _ in asked] == ["some/model", "some/model"]
    assert all((how["revision"], how["subfolder"]) == ("v2", "a") for _, how in asked)
    written = yaml.safe_load(yaml.safe_dump({"task": task.task, **model_settings(model), **args.to_dict()}))
    read = settings_of(written, PROFILES["quick"])
    assert read.model == {"revision": "v2", "subfolder": "a"} and read.dtype == "bfloat16"
    assert settings_of(written | {"model_init_kwargs": None}, PROFILES["quick"]).model == {"revision": "v2"}


@pytest.mark.slow
def test_gsm8k_trains_from_local_records_with_lora(tmp_path, warm_start_dir):
    if not GSM8K.exists():
        pytest.skip("no ../shared/data/gsm8k beside this checkout: the records are not part of the repository")

    arguments = settings(
        REPOSITORY / "configs" / "gsm8k-embedded.yaml", tmp_path, "--max_steps", "2", "--dataset_name", str(GSM8K),
        "--num_train_problems", "16", "--use_peft", "--lora_r", "4", "--entropy_probe_every", "1",
        "--entropy_probe_completions", "held_out", "--entropy_probe_num_completions", "8",
    )  # fmt: skip
    process = launch(arguments, warm_start_dir)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    rows = RunDirectory(tmp_path).metrics()
    assert len(rows) == 2 and all("entropy/delta_linear" in row for row in rows)
    assert json.loads((tmp_path / "environment.json").read_text())["num_trainable_parameters"] < 100_000


@pytest.mark.slow
def test_sigterm_ends_a_launched_run_with_a_checkpoint_from_which_it_goes_on(tmp_path, warm_start_dir):
    arguments = settings(REPOSITORY / "configs" / "quickstart.yaml", tmp_path, "--max_steps", "100000")
    process = launch(arguments, warm_start_dir)
    deadline = time.monotonic() + 200
    while not RunDirectory(tmp_path).metrics() and time.monotonic() < deadline:
        time.sleep(0.5)
    os.killpg(process.pid, signal.SIGTERM)  # as a scheduler does
    output, _ = process.communicate(timeout=60)
    steps = [row["step"] for row in RunDirectory(tmp_path).metrics()]
    assert (tmp_path / f"checkpoint-{steps[-1]}" / "trainer_state.json").exists(), output
    process = launch([*arguments, "--resume_from_checkpoint", "latest", "--additional_steps", "1"], warm_start_dir)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    assert [row["step"] for row in RunDirectory(tmp_path).metrics()] == [*steps, steps[-1] + 1]
    assert [start["after_step"] for start in RunDirectory(tmp_path).starts()] == [0, steps[-1]]
