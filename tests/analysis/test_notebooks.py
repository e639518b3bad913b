"""Every notebook runs on a real run and on one that lacks what it shows; none has outputs or logic of its own."""

import ast
import json
import os
import shutil
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from safetensors.numpy import load_file, save_file

from trl_entropy.runs.directory import RunDirectory

NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))
LOGIC = (ast.For, ast.While, ast.FunctionDef, ast.ClassDef, ast.If, ast.Try, ast.Lambda)


# What each notebook says of a run that lacks what it shows.
MISSING = {
    "01_training_and_evaluation": [
        "no evaluated checkpoints", "no evaluation on held-out prompts", "no completions", "trl-entropy evaluate"
    ],
    "02_entropy_change": ["no measured entropy changes", "no attributions", "entropy_attribution: token"],
    "03_noise_scale": ["no noise scales", "noise_scale_probe: true"],
    "04_fisher_kernel": ["no Fisher kernels", "fisher_probe: true"],
    "05_comparing_runs": [],
    "06_entropy_control": ["no entropies measured for a control", "entropy_control: hold"],
}  # fmt: skip


def executed(path, run, monkeypatch):
    """The outputs of a notebook's cells on a run; an error in a cell is raised."""
    monkeypatch.setenv("TRL_ENTROPY_RUN", str(run))
    monkeypatch.setenv("TRL_ENTROPY_RUNS", os.pathsep.join([str(run)]))
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=60, resources={"metadata": {"path": str(path.parent)}}).execute()
    return [output for cell in notebook.cells for output in cell.get("outputs", [])]


def printed(outputs):
    return "".join(output.get("text", "") for output in outputs)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path, real_run, monkeypatch):
    outputs = executed(path, real_run, monkeypatch)
    assert [output for output in outputs if "image/png" in output.get("data", {})]
    assert "nothing to show" not in printed(outputs)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_says_what_a_run_lacks(path, tmp_path, monkeypatch):
    """A run of two steps with nothing but a loss: no reward, no entropy, no evaluation, no probe, no config.yaml."""
    for step in (1, 2):
        RunDirectory(tmp_path / "bare").append_metrics(step, {"loss": 0.5})
    outputs = executed(path, tmp_path / "bare", monkeypatch)
    for sentence in MISSING[path.stem]:
        assert sentence in printed(outputs)


def test_notebook_of_entropy_change_on_a_run_attributed_by_completion(real_run, tmp_path, monkeypatch):
    run = tmp_path / "by-completion"
    shutil.copytree(real_run, run, ignore=shutil.ignore_patterns("checkpoint-*"))
    for file in run.glob("probes/attribution/*.safetensors"):
        arrays = load_file(file)
        kept = {name: array for name, array in arrays.items() if name not in ("logps", "entropy")}
        save_file(kept | {"attribution": arrays["attribution"].sum(1)}, file)
    assert executed(NOTEBOOKS[1], run, monkeypatch)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_has_no_outputs_and_no_logic(path):
    for cell in json.loads(path.read_text())["cells"]:
        if cell["cell_type"] != "code":
            continue
        assert cell["outputs"] == [] and cell["execution_count"] is None
        source = "".join(line for line in cell["source"] if not line.startswith("%"))
        assert not [node for node in ast.walk(ast.parse(source)) if isinstance(node, LOGIC)]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_ends_with_a_question_and_what_answers_it(path):
    *_, question, answer = json.loads(path.read_text())["cells"]
    assert question["source"][0].startswith("## ") and question["source"][0].strip().endswith("?")
    assert answer["cell_type"] == "code"
