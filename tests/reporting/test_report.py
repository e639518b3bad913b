"""The page: every number is one of the run's files, texts are escaped, nothing is loaded from a network."""

import csv
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd
import pytest

from trl_entropy.report import main
from trl_entropy.reporting.page import plain, render
from trl_entropy.reporting.write import write_page
from trl_entropy.runs.directory import RunDirectory
from trl_entropy.runs.set_aside import set_aside_after


class Page(HTMLParser):
    """Its numbers with where they come from, its tags' addresses, and its text."""

    def __init__(self, text):
        super().__init__()
        self.numbers, self.addresses, self.tags, self.text, self._open = [], [], set(), [], None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.tags.add(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "href", "srcset", "action")]
        self._open = attributes if tag == "data" else None

    def handle_data(self, data):
        self.text.append(data)
        if self._open is not None:
            self.numbers.append((self._open, data))
            self._open = None


def number_in_file(run: Path, origin: dict) -> float:
    """The number that a cell names, read with nothing of the package."""
    path, step, key = run / origin["data-file"], int(origin["data-step"]), origin["data-key"]
    if path.suffix == ".jsonl":
        rows = [json.loads(line) for line in path.read_text().splitlines()]
    else:
        with open(path, newline="") as file:
            rows = list(csv.DictReader(file))
    (row,) = (row for row in rows if int(row["step"]) == step)
    value = row[key]
    return float(row["not_finite"][key] if value is None and "not_finite" in row else value)


@pytest.fixture(scope="module")
def page(real_run):
    return Page(write_page([real_run], real_run / "report" / "index.html").read_text())


def test_every_number_is_the_files(page, real_run):
    for origin, text in page.numbers:
        assert text == f"{number_in_file(real_run, origin):.4g}", origin
    keys = {origin["data-key"] for origin, _ in page.numbers}
    assert {"reward", "entropy/policy", "pass@2", "pass@2_low", "pass@2_high", "max_correct_length"} <= keys
    assert len(page.numbers) > 50


def test_no_number_of_a_table_is_without_its_file(page, real_run):
    html = (real_run / "report" / "index.html").read_text()
    assert html.count("<td>") > 50
    for row in re.findall(r"<tr>(<td.*?)</tr>", html, re.DOTALL):
        _, *cells = re.findall(r"<td.*?>(.*?)</td>", row, re.DOTALL)
        for cell in cells:
            rest = re.sub(r"<data [^>]*>[^<]*</data>|<[^>]*>", "", cell)
            assert not re.search(r"\d", rest), cell
    assert {origin["data-file"] for origin, _ in page.numbers} == {
        "metrics.jsonl", "evaluation/metrics.csv", "evaluation/checkpoints.csv"
    }  # fmt: skip


def test_it_opens_without_network(page):
    assert page.addresses and all(address.startswith("data:image/png;base64,") for address in page.addresses)
    assert not page.tags & {"script", "link", "iframe", "object", "base", "form"}


def test_figures_lie_beside_the_page(page, real_run):
    names = {path.name for path in (real_run / "report").glob("*.png")}
    assert {"training-overview.png", f"entropy-change-{real_run.name}.png", f"evaluation-{real_run.name}.png"} <= names


def test_completions_and_settings_are_escaped(real_run, tmp_path):
    run = tmp_path / "<b>hostile"
    shutil.copytree(real_run, run)
    newest = max(run.glob("completions/*.parquet"))
    table = pd.read_parquet(newest)
    table["completion"] = "<script>alert(1)</script>\x1b[31m\u202e</pre>&amp;"
    table.to_parquet(newest)
    records = run / "evaluation" / "step_000003" / "records.parquet"
    rows = pd.read_parquet(records)
    rows["prompt_id"] = "<img src=x onerror=alert(2)>" + rows["prompt_id"]
    rows.to_parquet(records)
    (run / "config.yaml").write_text("note: '<script src=\"http://example.org/x.js\"></script>'\n")
    text = write_page([run], tmp_path / "page.html").read_text()
    page = Page(text)
    assert "script" not in page.tags and "b" not in page.tags
    assert all(address.startswith("data:") for address in page.addresses)
    assert "<script>alert(1)</script>[31m</pre>&amp;" in "".join(page.text)  # as text, control characters gone
    assert "\x1b" not in text and "\u202e" not in text


def test_several_runs_on_one_page(real_run, tmp_path, capsys):
    other = tmp_path / "other"
    shutil.copytree(real_run, other)
    shutil.rmtree(other / "evaluation")
    main([str(real_run), str(other), "--output", str(tmp_path / "both.html")])
    assert capsys.readouterr().out.splitlines()[-1] == str(tmp_path / "both.html")
    page = Page((tmp_path / "both.html").read_text())
    assert {origin["data-run"] for origin, _ in page.numbers} == {"three-steps", "other"}
    for origin, text in page.numbers:
        run = {"three-steps": real_run, "other": other}[origin["data-run"]]
        assert text == f"{number_in_file(run, origin):.4g}"


def test_runs_of_one_name_and_directories_without_metrics_are_refused(real_run, tmp_path):
    shutil.copytree(real_run, tmp_path / "again" / real_run.name)
    with pytest.raises(SystemExit, match="not all different"):
        main([str(real_run), str(tmp_path / "again" / real_run.name)])
    with pytest.raises(SystemExit, match=r"holds no metrics\.jsonl"):
        main([str(tmp_path)])


def test_a_live_run_of_one_step_has_a_page(tmp_path):
    RunDirectory(tmp_path / "live").append_metrics(1, {"reward": 0.25, "entropy/policy": 0.5})
    page = Page(write_page([tmp_path / "live"], tmp_path / "page.html").read_text())
    assert [text for _, text in page.numbers] == ["0.25", "0.25", "0.5", "0.5"]
    assert "No warnings." in "".join(page.text)


def test_plain_text_keeps_lines_and_letters():
    assert plain("a\tb\nc\x00\x9b\u2067d é") == "a\tb\ncd é"


def test_a_killed_run_has_the_pictures_of_the_whole_one_up_to_that_step(real_run, tmp_path):
    killed = real_run.parent / "killed" / real_run.name
    whole = tmp_path / real_run.name
    shutil.copytree(real_run, whole)
    set_aside_after(RunDirectory(whole), 2)
    shutil.rmtree(whole / "set_aside")
    shutil.rmtree(whole / "evaluation" / "step_000000")  # made after training
    (page, figures), (cut_page, cut_figures) = render([killed]), render([whole])
    assert {figure.name: figure.png for figure in figures} == {figure.name: figure.png for figure in cut_figures}
    assert len(figures) >= 4 and Page(page).numbers == Page(cut_page).numbers
    full = {figure.name: figure.png for figure in render([real_run])[1]}
    assert all(figure.png != full[figure.name] for figure in figures)
