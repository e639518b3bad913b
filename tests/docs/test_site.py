"""
The site without building it: its navigation names every page, every link leads somewhere, and the pages that are
written from tables and from a run are what these say. `bash launch/docs.sh` builds it.
"""

import math
import re
import unicodedata
from pathlib import Path

import pandas as pd
import pytest
import yaml
from includes import with_included
from one_step import TEMPLATE, numbers_of, page
from tables import metrics_page, refused_page, run_files_page

from trl_entropy import load_run, view
from trl_entropy.runs.inventory import RUN_FILES, file_of

REPOSITORY = Path(__file__).parents[2]
DOCS = REPOSITORY / "docs"
PAGES = sorted(path for path in DOCS.rglob("*.md") if "make" not in path.parts)
_LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")


def text_of(path):
    """The page as it is built: with what it includes, without code."""
    text = path.read_text(encoding="utf-8")
    if path.is_relative_to(DOCS):
        text = with_included(text, str(path.relative_to(DOCS)))
    return re.sub(r"```.*?```", "", text, flags=re.DOTALL)


def named(entry):
    """The pages that a part of the navigation names."""
    if isinstance(entry, str):
        return [entry]
    return [page for one in (entry.values() if isinstance(entry, dict) else entry) for page in named(one)]


def anchors_of(text):
    """The anchors of a page's headings, as Python-Markdown makes them."""
    found = set(re.findall(r"^::: ([\w.]+)$", text, re.MULTILINE))
    for title in re.findall(r"^#+ (.*)$", text, re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title).replace("`", "")
        plain = unicodedata.normalize("NFKD", plain).encode("ascii", "ignore").decode()
        found.add(re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", plain).strip().lower()))
    return found


def test_the_navigation_names_every_page():
    names = named(yaml.safe_load((REPOSITORY / "mkdocs.yml").read_text())["nav"])
    assert sorted(names) == [str(path.relative_to(DOCS)) for path in PAGES] and len(names) == len(set(names))


def broken_links(path):
    """What the links of a page lead to, where nothing is."""
    broken = []
    for link in _LINK.findall(text_of(path)):
        if link.startswith(("http://", "https://")):
            continue
        name, _, anchor = link.partition("#")
        target = (path.parent / name).resolve() if name else path
        if not target.is_file() or (anchor and anchor not in anchors_of(text_of(target))):
            broken.append(link)
    return broken


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(DOCS)))
def test_every_link_leads_somewhere(path):
    assert not broken_links(path)


def test_a_broken_link_is_noticed(tmp_path):
    wrong = tmp_path / "page.md"
    wrong.write_text("# A title\n[one](#a-title) [two](#another) [three](no/page)")
    assert broken_links(wrong) == ["#another", "no/page"]


def test_pages_from_tables_are_up_to_date():
    """Else: python docs/make/tables.py"""
    assert (DOCS / "metrics.md").read_text() == metrics_page()
    assert (DOCS / "run-files.md").read_text() == run_files_page()
    assert (DOCS / "refused.md").read_text() == refused_page()


def test_the_table_of_files_knows_what_a_real_run_leaves(real_run):
    paths = [str(path.relative_to(real_run)) for path in real_run.rglob("*") if path.is_file()]
    assert not [path for path in paths if file_of(path) is None] and len(paths) > 20
    assert file_of("probes/entropy/step_3.parquet") is None


def test_the_table_of_files_knows_every_tensor_and_column(real_run):
    run, num_named = load_run(real_run), 0
    for path in real_run.rglob("*"):
        known = file_of(str(path.relative_to(real_run)))
        if known is None or not known.parts:
            continue
        if path.suffix == ".safetensors":
            names = list(run.probe_file(path.parent.name, int(path.stem.removeprefix("step_"))))
        else:
            names = list((pd.read_parquet if path.suffix == ".parquet" else pd.read_csv)(path).columns)
        assert not [name for name in names if not known.has_part(name)], path
        num_named += len(names)
    assert num_named > 40


def test_the_snippets_read_a_real_run(real_run):
    run = load_run(real_run)
    for file in (file for file in RUN_FILES if file.snippet):
        code = re.sub(r"\b[12]0\b", "3", file.snippet)
        exec(code, {"run": run, "pandas": pd, "view": view})


def test_the_step_is_walked_through_with_the_runs_own_numbers(real_run, monkeypatch):
    """Every name of the template exists, and what the page computes by hand is what the probe logged."""
    run = load_run(real_run)
    medians = {"optimizer_state/exp_avg_p50": 1e-5, "optimizer_state/exp_avg_sq_p50": 1e-9}  # the run has every fifth
    rows = [row | medians for row in run.rows()]
    monkeypatch.setattr(run, "rows", lambda key="step": [row for row in rows if row.get(key) is not None])
    row, found = run.steps.loc[3], numbers_of(run, 3)
    measured = found["measured"]
    assert measured["change"] == pytest.approx(row["entropy/delta_measured"], rel=1e-4)
    assert measured["stderr"] == pytest.approx(row["entropy/delta_measured_stderr"], rel=1e-3)
    assert measured["before"] == pytest.approx(row["entropy/probe_batch"], rel=1e-6)
    assert math.fsum(found["parts"].values()) == pytest.approx(row["entropy/delta_linear"], rel=1e-4)
    changes = math.fsum(group["change"] for group in found["groups"])
    assert changes == pytest.approx(row["entropy/delta_gradient"], rel=1e-4)
    normaliser = len(found["groups"]) * run.config["num_generations"] * run.config["max_completion_length"]
    for group in found["groups"]:
        assert group["weight"] == pytest.approx(max(map(abs, group["advantages"])) / normaliser, rel=1e-4, abs=1e-12)
        assert abs(group["steepest"]) == pytest.approx(max(map(abs, group["advantages"])), abs=1e-6)
        if len({abs(one) for one in group["advantages"]}) == len(
            group["advantages"]
        ):  # else the largest has two signs
            assert group["coefficient"] == pytest.approx(group["steepest"] / normaliser, rel=1e-4, abs=1e-12)
    assert found["printed_changes"] == pytest.approx(changes * 1e6, abs=0.005 * len(found["groups"]))
    example = measured["example"]
    assert math.exp(example["exponent"]) == pytest.approx(example["weight"], rel=1e-9)
    assert abs(example["exponent"]) == pytest.approx(abs(example["before"] - example["after"]), rel=1e-9)
    for token in found["tokens"]:
        product = found["adamw"]["coefficient"] * token["weight"] * token["derivative"]
        assert product == pytest.approx(token["change"], rel=1e-6)
    assert f"step {3} of the quickstart" in page(run, 3)
    assert "{{" in TEMPLATE.read_text() and "{{" not in page(run, 3)
