"""Every notebook runs on a real run; none has outputs or logic of its own."""

import ast
import json
import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))
LOGIC = (ast.For, ast.While, ast.FunctionDef, ast.ClassDef, ast.If, ast.Try, ast.Lambda)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path, real_run, monkeypatch):
    monkeypatch.setenv("TRL_ENTROPY_RUN", str(real_run))
    monkeypatch.setenv("TRL_ENTROPY_RUNS", os.pathsep.join([str(real_run)]))
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=60, resources={"metadata": {"path": str(path.parent)}}).execute()
    figures = [
        output
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if "image/png" in output.get("data", {})
    ]
    assert figures


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_has_no_outputs_and_no_logic(path):
    for cell in json.loads(path.read_text())["cells"]:
        if cell["cell_type"] != "code":
            continue
        assert cell["outputs"] == [] and cell["execution_count"] is None
        source = "".join(line for line in cell["source"] if not line.startswith("%"))
        assert not [node for node in ast.walk(ast.parse(source)) if isinstance(node, LOGIC)]
