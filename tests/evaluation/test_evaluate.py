"""`trl-entropy evaluate` as a user starts it: full checkpoint, adapter, start policy, a failure, a timeout, again."""

import csv
import json
import os
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pandas as pd
import pytest
import yaml
from small_evaluation import CONFIG

from trl_entropy.evaluate import main
from trl_entropy.evaluation import process
from trl_entropy.evaluation.kept import folder_of
from trl_entropy.evaluation.plan import PROFILES, Job, read_config, settings_of, targets_of
from trl_entropy.evaluation.process import CANCELLED, run_job
from trl_entropy.runs.directory import CheckpointSummary, RunDirectory
from trl_entropy.runs.set_aside import set_aside_after
from trl_entropy.tasks import rewards

# 6 problems, and batches so small that an evaluation can be cut off between them
SMALL = ["--subset-frac", "0.004", "--num-samples", "4", "--batch-size", "2"]


@pytest.fixture(scope="module")
def run(tmp_path_factory, tokenizer, warm_start_dir):
    """Checkpoints of step 2 (all weights), 4 (an adapter on the start policy) and 6 (nothing in it)."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    path = tmp_path_factory.mktemp("run")
    (path / "config.yaml").write_text(yaml.safe_dump(CONFIG | {"max_completion_length": 32, "temperature": 1.0}))
    RunDirectory(path).append_evaluation(0, {"reward": 0.5})
    model = AutoModelForCausalLM.from_pretrained(warm_start_dir)
    model.save_pretrained(path / "checkpoint-2")
    get_peft_model(model, LoraConfig(r=2, target_modules="all-linear")).save_pretrained(path / "checkpoint-4")
    # an adapter that begins at zero, on a base that lay in another machine's cache
    adapter = path / "checkpoint-4" / "adapter_config.json"
    adapter.write_text(json.dumps(json.loads(adapter.read_text()) | {"base_model_name_or_path": "/gone/base"}))
    (path / "checkpoint-6").mkdir()
    for step in (2, 4):
        tokenizer.save_pretrained(path / f"checkpoint-{step}")
    return path


def cut_off(run, step):
    """An evaluation as `main` starts it, cancelled as soon as the first batch is done."""
    config, cancel = read_config(run), threading.Event()
    settings = settings_of(config, PROFILES["quick"], subset_frac=0.004, num_samples=4)
    output = RunDirectory(run).checkpoint_folder(step)
    job = Job(targets_of(run, config, str(step))[0], settings, str(output), 2, "cpu")
    assert run_job(job, 300.0, lambda done, total: cancel.set(), cancel) == CANCELLED
    return list(folder_of(output).glob("*.parquet"))


@pytest.mark.slow
def test_evaluate_again_and_after_a_failure(run, capsys):
    kept = cut_off(run, 2)
    written = [path.stat().st_mtime_ns for path in kept]
    assert 1 <= len(kept) < 15 and not RunDirectory(run).checkpoint_folder(2).exists()
    begun = time.time_ns()
    with pytest.raises(SystemExit, match=r"1 of 4 failed \(steps 6\); call again"):
        main(["--run", str(run), *SMALL])
    said = capsys.readouterr().out
    assert "step     6  failed: " in said and "checkpoint-6 holds no weights" in said and "step     2  pass@1" in said
    assert max(written) < begun and not list((run / "evaluation").glob(".*"))
    folders = [RunDirectory(run).checkpoint_folder(step) for step in (0, 2, 4)]
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in folders]
    # the start policy, its copy and an adapter that changes nothing are one policy, and draw the same
    # and that of step 2 was cut off and has gone on
    assert summaries[0]["metrics"] == summaries[1]["metrics"] == summaries[2]["metrics"]
    whole, resumed = (pd.read_parquet(folder / "records.parquet") for folder in folders[:2])
    assert to_lists(whole) == to_lists(resumed)
    assert 0.1 < summaries[0]["metrics"]["pass@1"]["value"] < 0.8
    check_records(pd.read_parquet(folders[1] / "records.parquet"))
    check_tables(run, summaries)
    times = [(folder / "summary.json").stat().st_mtime_ns for folder in folders]
    (run / "evaluation" / "checkpoints.csv").unlink()  # as if it had been killed between the results and the tables
    main(["--run", str(run), "--checkpoints", "0,2,4", *SMALL])
    assert "0 checkpoints to evaluate, 3 already done" in capsys.readouterr().out
    assert times == [(folder / "summary.json").stat().st_mtime_ns for folder in folders]
    check_tables(run, summaries)


def check_records(records):
    assert len(records) == 6 * 5 and records["greedy"].sum() == 6 and records["prompt_id"].nunique() == 6
    assert records.groupby("prompt_id")["sample"].apply(sorted).map(list).tolist() == [[0, 0, 1, 2, 3]] * 6
    judged = rewards.tag_pref(None, records["completion"].tolist(), answer=records["answer"].tolist())
    assert judged == records["correct"].astype(float).tolist() == records["tag_pref"].tolist()
    assert (records["entropies"].map(len) == records["length"]).all()


def check_tables(run, summaries):
    with open(run / "evaluation" / "checkpoints.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["0", "2", "4"]
    assert float(rows[1]["pass@4_low"]) == summaries[1]["metrics"]["pass@4"]["low"]
    consolidated = pd.read_csv(run / "evaluation" / "consolidated_metrics.csv")
    trained = consolidated[consolidated["source"] == "training"]
    assert trained[["step", "metric", "value"]].values.tolist() == [[0, "reward", 0.5]]
    assert set(consolidated["unit"].dropna()) == {"1", "tokens", "nats/token", "answers"}


def to_lists(records):
    """Every value of the table, those of arrays bit for bit."""
    return [[list(value) if hasattr(value, "__len__") else value for value in row] for row in records.values.tolist()]


def test_a_timeout_is_said_and_leaves_the_former_results(run, capsys, monkeypatch):
    """A worker that has begun to write its results when its time is over."""
    code = (
        "import json, pathlib, sys, time; from trl_entropy.runs.durable import replacing\n"
        "with replacing(pathlib.Path(json.loads(sys.argv[1])['output'])) as new:\n"
        "    new.mkdir(); print('progress', 1, 2, flush=True); time.sleep(300)"
    )

    def start(command, **how):
        return subprocess.Popen([sys.executable, "-c", code, *command[3:]], **how)

    its_own = SimpleNamespace(Popen=start, PIPE=subprocess.PIPE, DEVNULL=subprocess.DEVNULL)
    monkeypatch.setattr(process, "subprocess", its_own)
    shown, former = [], RunDirectory(run).checkpoint_folder(2)
    monkeypatch.setattr("trl_entropy.evaluate.Progress.show", lambda *given: shown.append(given))
    former.mkdir(parents=True, exist_ok=True)
    (former / "former").write_text("results")
    with pytest.raises(SystemExit, match="1 of 1 failed"):
        main(["--run", str(run), "--checkpoints", "2", "--timeout", "4", "--seed", "7"])
    said = capsys.readouterr().out
    assert shown and "failed: not finished after 4 s; what is generated is kept, call again to go on" in said
    assert not list((run / "evaluation").glob(".step*")) and (former / "former").read_text() == "results"


def test_a_wrong_step_is_refused_before_anything_starts(run):
    with pytest.raises(SystemExit, match="no checkpoint of step 3; it has 0, 2, 4, 6"):
        main(["--run", str(run), "--checkpoints", "3"])


def test_resuming_a_run_drops_evaluations_of_later_steps(tmp_path):
    directory = RunDirectory(tmp_path)
    for step in (10, 20):
        directory.checkpoint_folder(step).mkdir(parents=True)
        summary = dict.fromkeys(CheckpointSummary.__annotations__) | {"step": step, "metrics": {}}
        summary |= {"num_prompts": 1, "settings": {"num_samples": 1}}
        (directory.checkpoint_folder(step) / "summary.json").write_text(json.dumps(summary))
    (tmp_path / "evaluation" / "step_000020.log").write_text("cancelled")
    aside = set_aside_after(directory, 15)
    assert aside is not None and (aside / "evaluation" / "step_000020" / "summary.json").exists()
    assert [summary["step"] for summary in directory.checkpoint_summaries()] == [10]


@pytest.mark.parametrize("ending", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_command_in_one_line(run, capsys, monkeypatch, ending):
    """It leaves through `run_job`, which ends the worker; the signal goes back to whoever had it."""
    left = []

    def run_job(job, *more):
        try:
            os.kill(os.getpid(), ending)
            time.sleep(30)
        finally:
            left.append(job.target.step)

    monkeypatch.setattr("trl_entropy.evaluate.run_job", run_job)
    before = signal.getsignal(signal.SIGTERM)
    ignored = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it in the background
    with pytest.raises(SystemExit) as ended:
        main(["--run", str(run), "--checkpoints", "2", "--seed", "9"])
    signal.signal(signal.SIGINT, ignored)
    assert ended.value.code == 128 + ending and left == [2]
    assert (
        capsys.readouterr().err == "The evaluation is cut off. What it has generated is kept: call again to go on.\n"
    )
    assert signal.getsignal(signal.SIGTERM) == before
