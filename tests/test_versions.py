"""An untested TRL or transformers is named, once."""

import subprocess
import sys

import pytest

from trl_entropy import _versions


@pytest.mark.parametrize(
    ("installed", "named"),
    [("1.16.0", False), ("1.16.3", False), ("1.17.0", True), ("1.15.9", True), ("2.0.0.dev0", True)],
)
def test_versions_outside_the_range_are_named(monkeypatch, installed, named):
    monkeypatch.setattr(_versions, "version", lambda package: installed if package == "trl" else "5.23.0")
    messages = _versions.untested_versions()
    assert len(messages) == int(named)
    if named:
        assert messages[0] == f"trl {installed} is installed, trl_entropy is tested with trl>=1.16,<1.17"


def test_importing_warns_once():
    code = (
        "import importlib.metadata as m, warnings; real = m.version; "
        "m.version = lambda p: '9.9.9' if p == 'trl' else real(p); "
        "warnings.simplefilter('always'); import trl_entropy; import trl_entropy.runs.directory"
    )
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert child.stderr.count("trl 9.9.9 is installed") == 1
