"""A version that was not tested is named, once, of every package whose numbers count."""

import configparser
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from trl_entropy import _versions

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("installed", "named"),
    [("1.16.0", False), ("1.16.3", False), ("1.17.0", True), ("1.15.9", True), ("2.0.0.dev0", True)],
)
def test_versions_outside_the_range_are_named(monkeypatch, installed, named):
    monkeypatch.setattr(_versions, "version", lambda package: installed if package == "trl" else version(package))
    messages = _versions.untested_versions()
    assert len(messages) == int(named)
    if named:
        assert messages[0] == f"trl {installed} is installed, trl_entropy is tested with trl>=1.16,<1.17"


@pytest.mark.parametrize(
    ("package", "installed", "named"),
    [
        ("transformers", "5.22.1", True),
        ("transformers", "5.22.2", False),
        ("torch", "2.13.0+cpu", False),
        ("torch", "2.14.0", True),
        ("pandas", "2.3.3", True),
        ("peft", "0.20.0", True),
        ("accelerate", "1.14.0", True),
        ("datasets", "5.3.0", True),
        ("deepspeed", "0.19.7", True),
        ("deepspeed", "0.19.8", False),
        ("deepspeed", "0.20.0", True),
    ],
)
def test_every_package_has_a_range(monkeypatch, package, installed, named):
    monkeypatch.setattr(_versions, "version", lambda one: installed if one == package else version(one))
    assert [message.split()[:2] for message in _versions.untested_versions()] == [[package, installed]] * named


def test_setup_cfg_has_the_same_ranges_and_the_constraints_lie_in_them():
    settings = configparser.ConfigParser()
    settings.read(ROOT / "setup.cfg")
    extras = settings["options.extras_require"]
    written = "\n".join([settings["options"]["install_requires"], extras["train"], extras["deepspeed"]])
    pinned = (ROOT / "constraints.txt").read_text()
    for package, (low, high) in _versions.TESTED.items():
        bounds = re.search(rf"^{package}(?:\[.*\])?>=([\d.]+),<([\d.]+)$", written, re.MULTILINE).groups()
        assert tuple(map(_versions._parse, bounds)) == (low, high), package
        (exact,) = re.findall(rf"^{package}==(\S+)$", pinned, re.MULTILINE)
        assert low <= _versions._parse(exact) < high


def test_importing_warns_once():
    code = (
        "import importlib.metadata as m, warnings; real = m.version; "
        "m.version = lambda p: '9.9.9' if p == 'trl' else real(p); "
        "warnings.simplefilter('always'); import trl_entropy; import trl_entropy.runs.directory"
    )
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert child.stderr.count("trl 9.9.9 is installed") == 1
