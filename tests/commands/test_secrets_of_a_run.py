"""Secrets of a dozen forms, planted wherever a user may put one, stand nowhere in what a run leaves and prints."""

import contextlib
import dataclasses
import io
import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from planted_secrets import BY_FORM, IN_TEXT

from trl_entropy import DrGRPOConfig, archive, doctor, evaluate, report, train
from trl_entropy.models.embedded import build_model, build_tokenizer

pytestmark = pytest.mark.slow
REPOSITORY = Path(__file__).parents[2]
SMALL = ["--max_steps", "1", "--num_prompts_per_step", "2", "--per_device_train_batch_size", "8", "--num_generations",
         "4", "--num_eval_problems", "2", "--per_device_eval_batch_size", "2", "--num_generations_eval", "1",
         "--max_completion_length", "4", "--entropy_probe_num_completions", "8", "--save_strategy", "steps",
         "--save_steps", "1", "--report_to", "tensorboard"]  # fmt: skip


class Planted:
    """Secrets, each different from all others, and where each was put."""

    def __init__(self) -> None:
        self.where: dict[str, str] = {}

    def by_name(self, where: str) -> str:
        """One without a form, which only the name of its field tells."""
        secret = f"plain{len(self.where):02}word"
        self.where[secret] = where
        return secret

    def by_form(self, where: str, between: str = " ", in_text: bool = True) -> str:
        """A text with one of each form; those that what stands around them tells only if asked for."""
        parts = []
        forms = {name: (secret, secret) for name, secret in BY_FORM.items()}
        for name, (text, secret) in (forms | IN_TEXT if in_text else forms).items():
            new = f"{secret[:-2]}{len(self.where):02}"  # still of the same form
            self.where[new] = f"{where}, {name}"
            parts.append(text.replace(secret, new))
        return between.join(parts)

    def found_in(self, content: bytes) -> list[str]:
        return sorted({where for secret, where in self.where.items() if secret.encode() in content})


def output_of(command: Callable[[list[str]], None], *arguments: object) -> tuple[bytes, object]:
    """What a command prints and logs here, and its exit status or last words."""
    text, status = io.StringIO(), None
    handler = logging.StreamHandler(text)
    logging.getLogger().addHandler(handler)
    try:
        with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
            command([str(argument) for argument in arguments])
    except SystemExit as ended:
        status = ended.code
    finally:
        logging.getLogger().removeHandler(handler)
    return f"{text.getvalue()}\n{status}".encode(), status


def output_of_training(*arguments: object, **environment: str) -> tuple[bytes, int]:
    """The same of a training in a process of its own, whose command line and environment it writes down."""
    command = [sys.executable, "-m", "trl_entropy.train", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, check=False, timeout=300, env={**os.environ, **environment})
    return done.stdout + done.stderr, done.returncode


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("policy")
    build_model(build_tokenizer(), seed=0).save_pretrained(path)
    build_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def left(tmp_path_factory, model) -> tuple[Planted, dict[str, bytes]]:
    """What was planted; every file of run, page, archive and model card, and every output, by its name."""
    planted, folder = Planted(), tmp_path_factory.mktemp("planted")
    run, config = folder / "run", folder / "config.yaml"
    text = (REPOSITORY / "configs" / "quickstart.yaml").read_text()
    config.write_text(f"{text}\nhub_token: {planted.by_name('config file, hub_token')}\n"
                      f"run_name: {json.dumps(planted.by_form('config file, run_name'))}\n")  # fmt: skip
    environment = {
        "HF_HUB_TOKEN": planted.by_name("environment, HF_HUB_TOKEN"),
        "ACCELERATE_API_KEY": planted.by_name("environment, ACCELERATE_API_KEY"),
        "TORCH_NOTE": planted.by_form("environment, TORCH_NOTE"),
    }
    given = [
        *("--config", config, "--output_dir", run, "--model_name_or_path", model, *SMALL),
        *("--model_init_kwargs", json.dumps({"token": planted.by_name("argv, model_init_kwargs.token")})),
        *("--hub_model_id", planted.by_form("argv, hub_model_id")),
        *("--trackio_space_id", planted.by_form("argv, trackio_space_id")),
    ]
    other = [*given, "--resume_from_checkpoint", "latest", "--additional_steps", "1", "--learning_rate", "1e-9"]
    changed = ["--resume_allow_changes", "learning_rate", f"--hub_token={planted.by_name('argv, --hub_token=')}"]
    whole = {
        "doctor": output_of(doctor.main, *given),
        "train": output_of_training(*given, **environment),
        "resume": output_of_training(*other, *changed, **environment),
        "evaluate": output_of(evaluate.main, "--run", run, "--checkpoints", "1", "--subset-frac", "0.001"),
        "report": output_of(report.main, run),
        "archive": output_of(archive.main, run, f"file://{folder / 'archive'}"),
        "archive in memory": output_of(archive.main, run, f"memory://user:{planted.by_name('argv, URL')}@host/x"),
    }
    for name, (said, status) in whole.items():
        assert status in (0, None), f"{name}: {said.decode()[-3000:]}"
    wrong = planted.by_form("argv, refused")
    in_a_name = planted.by_form("name of a folder", between="_", in_text=False)
    refused = {
        "a resumption": output_of(train.main, *other, *changed, "--optim_args", wrong),
        "a value": output_of(train.main, *given, "--lr_scheduler_kwargs", f"[{wrong}"),
        "a setting": output_of(train.main, *given, "--note", wrong),
        "a choice": output_of(train.main, *given, "--entropy_attribution", wrong),
        "a dataset": output_of(train.main, *given, "--task", "gsm8k", "--dataset_name", wrong),
        "a model": output_of(train.main, *given, "--model_name_or_path", wrong),
        "a report": output_of(report.main, folder / in_a_name),
        "an evaluation": output_of(evaluate.main, "--run", folder / in_a_name),
        "an archive": output_of(archive.main, run, f"unknown://{wrong}"),
        "an archive of": output_of(archive.main, folder / in_a_name, folder),
    }
    for name, (said, status) in refused.items():
        assert status not in (0, None), f"{name}: {said.decode()[-3000:]}"
    outputs = {name: said for name, (said, _) in {**whole, **refused}.items()}
    files = [path for part in (run, folder / "archive") for path in part.rglob("*") if path.is_file()]
    return planted, {str(path.relative_to(folder)): path.read_bytes() for path in files} | outputs


def test_no_secret_is_in_a_file_or_on_the_console(left):
    planted, contents = left
    leaks = [f"{name}: {where}" for name, content in contents.items() for where in planted.found_in(content)]
    assert not leaks, "\n".join(leaks)


def test_what_was_looked_through_is_there_and_says_that_something_was_masked(left):
    _, contents = left
    names = set(contents)
    for part in ("run", "archive/run"):
        assert {
            f"{part}/{name}" for name in ("config.yaml", "environment.json", "starts.jsonl", "metrics.jsonl")
        } < names
        assert f"{part}/checkpoint-2/training_args.bin" in names and f"{part}/report/index.html" in names
        assert f"{part}/checkpoint-2/README.md" in names or f"{part}/README.md" in names
        for name in ("config.yaml", "environment.json", "starts.jsonl"):
            assert b"<secret>" in contents[f"{part}/{name}"], name
    assert any("tfevents" in name for name in names)


def test_a_secret_that_is_left_would_be_found(left):
    planted, _ = left
    assert len(planted.where) > 80
    for secret, where in planted.where.items():
        assert where in planted.found_in(b"\x00" + secret.encode() + b"\x00")


def test_the_settings_themselves_keep_their_secrets():
    args = DrGRPOConfig(output_dir="x", hub_token="plain00word", use_cpu=True, bf16=False)
    assert args.hub_token == "plain00word" and dataclasses.asdict(args)["hub_token"] == "plain00word"
