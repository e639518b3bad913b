"""pandas is one of which groups of categories are those that occur: 2.x also made all combinations of them."""

import configparser
import re
from importlib.metadata import version
from pathlib import Path

import pandas as pd

ROOT = Path(__file__).parents[2]


def test_groups_are_those_that_occur():
    """A prompt belongs to its step alone, and a category without a row has no group."""
    kinds = pd.CategoricalDtype(["rare", "common", "never"])
    table = pd.DataFrame({"step": [1, 1, 2], "prompt_index": [0, 1, 5], "value": [1.0, 2.0, 3.0]})
    table["category"] = pd.Series(["rare", "common", "rare"], dtype=kinds)
    sums = table.groupby(["step", "prompt_index", "category"])["value"].sum()
    assert sums.index.tolist() == [(1, 0, "rare"), (1, 1, "common"), (2, 5, "rare")]
    assert table.groupby("category")["value"].mean().to_dict() == {"rare": 2.0, "common": 2.0}


def test_what_is_installed_and_what_is_pinned_lie_in_the_bounds():
    settings = configparser.ConfigParser()
    settings.read(ROOT / "setup.cfg")
    (low, high) = re.search(r"^pandas>=(\d+),<(\d+)$", settings["options"]["install_requires"], re.MULTILINE).groups()
    pinned = re.search(r"^pandas==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE).group(1)
    for one in (pinned, version("pandas")):
        assert int(low) <= int(one.split(".")[0]) < int(high)
