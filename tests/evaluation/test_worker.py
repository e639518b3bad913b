"""One evaluation in this process: which weights its results name, and what it says when it fails."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from small_evaluation import CONFIG

from trl_entropy.evaluation import worker
from trl_entropy.evaluation.plan import PROFILES, Job, Target, settings_of


@pytest.fixture
def job(policy, tokenizer, tmp_path):
    """Three problems, at most 4 tokens, one sample."""
    checkpoint = tmp_path / "checkpoint-5"
    policy.save_pretrained(checkpoint)
    tokenizer.save_pretrained(checkpoint)
    settings = settings_of(CONFIG | {"max_completion_length": 4}, PROFILES["quick"], num_problems=3, num_samples=1)
    return Job(Target(5, str(checkpoint)), settings, str(tmp_path / "step_000005"), 8, "cpu")


def summary_of(job):
    return json.loads((folder_of_results(job) / "summary.json").read_text())


def folder_of_results(job):
    return Path(job.output)


def test_results_name_the_weights_that_were_there_before(job, monkeypatch):
    before, load = job.target.fingerprint(), worker.load_policy

    def changing(model, *given):
        loaded = load(model, *given)
        (folder_of_results(job).parent / "checkpoint-5" / "more.safetensors").write_bytes(b"written meanwhile")
        return loaded

    monkeypatch.setattr(worker, "load_policy", changing)
    worker.evaluate(job)
    assert summary_of(job)["fingerprint"] == before != job.target.fingerprint()
    assert not list(folder_of_results(job).parent.glob(".*"))


def test_the_time_of_what_was_kept_counts(job, monkeypatch):
    monkeypatch.setattr(worker, "_judged", lambda *rows: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        worker.evaluate(job)
    monkeypatch.undo()
    read, times = worker.KeptBatches.read, []

    def reading(self, *which):
        rows = read(self, *which)
        times.append(rows is not None)
        self.seconds += 1000.0
        return rows

    monkeypatch.setattr(worker.KeptBatches, "read", reading)
    worker.evaluate(job)
    assert times == [True, True] and 2000 < summary_of(job)["seconds"] < 2500


def test_a_failure_is_said_in_one_line(job, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(worker, "quiet_libraries", lambda: None)
    weights = tmp_path / "checkpoint-5" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(SystemExit) as ended:
        worker.run(job.to_json())
    said = capsys.readouterr()
    (line,) = [line for line in said.out.splitlines() if line.startswith("failed ")]
    assert ended.value.code == 1 and line.startswith("failed SafetensorError: ") and "Traceback" in said.err


def test_data_that_cannot_be_read_is_said_before_the_model_is_loaded(job, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(worker, "quiet_libraries", lambda: None)
    monkeypatch.setattr(worker, "load_policy", lambda *given: pytest.fail("loaded"))
    task = {"task": "gsm8k", "dataset_name": str(tmp_path / "gone.jsonl")}
    with pytest.raises(SystemExit):
        worker.run(replace(job, settings=replace(job.settings, task=task)).to_json())
    assert capsys.readouterr().out.startswith("failed dataset_name: there is no file or folder")
