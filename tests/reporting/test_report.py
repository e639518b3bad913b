"""The page: every number is one of the run's files, texts are escaped, nothing is loaded from a network."""

import base64
import csv
import hashlib
import itertools
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from safetensors.numpy import load_file, save_file

from trl_entropy.analysis.attribution import attribution_table
from trl_entropy.analysis.run import load_run
from trl_entropy.report import main
from trl_entropy.reporting import sections
from trl_entropy.reporting.page import plain, render
from trl_entropy.reporting.write import write_page, write_report_of_finished_run
from trl_entropy.runs.directory import RunDirectory
from trl_entropy.runs.set_aside import set_aside_after
from trl_entropy.runs.strict_json import to_line


class Page(HTMLParser):
    """Its numbers with where they come from, its tags' addresses, its text, and apart from it that of its scripts."""

    def __init__(self, text):
        super().__init__()
        self.numbers, self.addresses, self.tags, self.text, self._open = [], [], set(), [], None
        self.scripts, self.metas = [], []  # attributes and text of each script
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        if tag == "script":
            self.scripts.append((attributes, ""))
            self._open = "script"
            return
        self.tags.add(tag)
        if tag == "meta":
            self.metas.append(attributes)
        self.addresses += [value for name, value in attrs if name in ("src", "href", "srcset", "action")]
        self._open = attributes if tag == "data" else None

    def handle_endtag(self, tag):
        if tag == "script":
            self._open = None

    def handle_data(self, data):
        if self._open == "script":
            attributes, text = self.scripts.pop()
            self.scripts.append((attributes, text + data))
            return
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
    return Page(write_page([real_run], real_run / "report" / "index.html", figures=True).read_text())


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
    (policy,) = (attributes["content"] for attributes in page.metas if "http-equiv" in attributes)
    assert "default-src 'none'" in policy and "connect-src" not in policy
    kinds = [attributes.get("type") for attributes, _ in page.scripts]
    assert kinds == [*["application/json"] * (len(kinds) - 1), None]
    code = page.scripts[-1][1].encode()
    assert f"script-src 'sha256-{base64.b64encode(hashlib.sha256(code).digest()).decode()}'" in policy
    assert not page.tags & {"script", "link", "iframe", "object", "base", "form"}


def test_figures_lie_beside_the_page(page, real_run):
    names = {path.name for path in (real_run / "report").glob("*.png")}
    assert {"training-overview.png", f"entropy-change-{real_run.name}.png", f"evaluation-{real_run.name}.png"} <= names


def test_figures_are_files_only_when_asked_for(real_run, tmp_path):
    (tmp_path / "run").mkdir()
    shutil.copy(real_run / "metrics.jsonl", tmp_path / "run")
    main([str(tmp_path / "run")])
    assert {path.name for path in (tmp_path / "run" / "report").iterdir()} == {"index.html", "training.png"}
    main([str(tmp_path / "run"), "--figures"])
    assert (tmp_path / "run" / "report" / "training-overview.png").exists()


def test_completions_and_settings_are_escaped(real_run, tmp_path):
    run = tmp_path / "<b>hostile"
    shutil.copytree(real_run, run)
    newest = max(run.glob("completions/completions_*.parquet"))
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
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again"]  # no folder report


@pytest.mark.parametrize("content", [bytes(500), b'{"step": 1, "rew', b"\xff\xfe\n"])
def test_a_log_that_is_damaged_throughout_is_not_said_to_be_missing(tmp_path, content):
    (tmp_path / "metrics.jsonl").write_bytes(content)
    with pytest.raises(SystemExit, match=r"metrics\.jsonl is damaged: none of its lines can be read") as end:
        main([str(tmp_path)])
    assert str(end.value).startswith("Error: ") and "\n" not in str(end.value)
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_live_run_of_one_step_has_a_page(tmp_path):
    RunDirectory(tmp_path / "live").append_metrics(1, {"reward": 0.25, "entropy/policy": 0.5})
    page = Page(write_page([tmp_path / "live"], tmp_path / "page.html").read_text())
    assert [text for _, text in page.numbers] == ["0.25", "0.25", "0.5", "0.5"]
    assert "No warnings." in "".join(page.text)


def test_plain_text_keeps_lines_and_letters():
    assert plain("a\tb\nc\x00\x9b\u2067d é") == "a\tb\ncd é"


@pytest.mark.slow
def test_a_killed_run_has_the_pictures_of_the_whole_one_up_to_that_step(real_run, tmp_path):
    killed = real_run.parent / "killed" / real_run.name
    whole = tmp_path / real_run.name
    shutil.copytree(real_run, whole)
    set_aside_after(RunDirectory(whole), 2)
    shutil.rmtree(whole / "set_aside")
    shutil.rmtree(whole / "evaluation" / "step_000000")  # made after training
    (page, figures), (cut_page, cut_figures) = render([load_run(killed)]), render([load_run(whole)])
    assert {figure.name: figure.png for figure in figures} == {figure.name: figure.png for figure in cut_figures}
    assert len(figures) >= 4 and Page(page).numbers == Page(cut_page).numbers
    full = {figure.name: figure.png for figure in render([load_run(real_run)])[1]}
    assert all(figure.png != full[figure.name] for figure in figures)


def copied(run: Path, target: Path) -> Path:
    """A copy without the weights of checkpoints, which a page does not read."""
    shutil.copytree(run, target, ignore=shutil.ignore_patterns("model.safetensors", "report"))
    return target


def text_of(path: Path) -> str:
    return "".join(Page(path.read_text()).text)


DAMAGED = (
    "config.yaml", "environment.json", "evaluation/metrics.csv", "evaluation/step_000003/positions.csv",
    "evaluation/step_000003/records.parquet", "probes/attribution/step_000002.safetensors",
    "probes/fisher/step_000003.safetensors", "completions/completions_00003.parquet", "probes/tokenizer.json",
)  # fmt: skip


@pytest.mark.parametrize("damage", [
    # Half a YAML may be a whole one by chance; no YAML has a line that begins with @.
    lambda content: content[: len(content) // 2 + 1] + b"\n@",
    lambda content: b"", lambda content: bytes(len(content)),
], ids=["cut", "empty", "zeros"])  # fmt: skip
def test_a_page_without_damaged_files_names_each_once_on_the_console(real_run, tmp_path, caplog, damage):
    run = copied(real_run, tmp_path / "damaged")
    for name in DAMAGED:
        (run / name).write_bytes(damage((run / name).read_bytes()))
    with open(run / "metrics.jsonl", "ab") as file:
        file.write(b'{"step": 4, "rew')
    text = text_of(write_page([run], tmp_path / "page.html"))
    for name in (*DAMAGED, "metrics.jsonl"):
        said = [message for message in caplog.messages if str(run / name) in message]
        assert said and all("\n" not in message for message in said), name
        assert str(run / name) in text, name
    for section in ("Reward and entropy", "Entropy change: predicted against measured", "Gradient noise"):
        assert section in text
    assert "Which tokens changed the entropy" not in text and "How completions influence" in text


def test_a_summary_of_an_evaluation_that_is_cut_costs_the_evaluation_alone(real_run, tmp_path):
    run = copied(real_run, tmp_path / "damaged")
    summary = run / "evaluation" / "step_000003" / "summary.json"
    summary.write_text(summary.read_text()[:100])
    text = text_of(write_page([run], tmp_path / "page.html"))
    assert f"Evaluation across checkpoints of damaged is left out: {summary} cannot be read" in text
    assert "Which tokens changed the entropy" in text and "How completions influence one another" in text


def test_settings_that_are_cut_in_any_line_are_no_settings(real_run, tmp_path):
    """A part of a YAML text is YAML too."""
    (tmp_path / "config.yaml").write_text("beta: 0.0\nlearning_rate: 0.00")
    with pytest.raises(ValueError, match=r"config\.yaml cannot be read: it is cut or damaged"):
        assert load_run(tmp_path).config


@pytest.mark.parametrize("topic", [topic.title for topic in sections._TOPICS])
def test_a_section_that_raises_is_a_sentence_and_the_others_stay(real_run, tmp_path, monkeypatch, caplog, topic):
    def failing(run):
        raise ZeroDivisionError("a fault\nof two lines.")

    changed = [
        sections.Topic(kept.title, kept.text, failing if kept.title == topic else lambda run: None)
        for kept in sections._TOPICS
    ]
    monkeypatch.setattr(sections, "_TOPICS", changed)
    monkeypatch.setattr("trl_entropy.reporting.page.attribution_section", lambda run: None)
    text = text_of(write_page([real_run], tmp_path / "page.html"))
    sentence = f"{topic} of three-steps is left out: ZeroDivisionError: a fault of two lines."
    assert caplog.messages == [sentence] and sentence in text and "Reward and entropy" in text


def test_a_finished_training_does_not_fail_with_its_page(tmp_path, caplog):
    (tmp_path / "metrics.jsonl").write_text("")
    assert write_report_of_finished_run(tmp_path) is None
    (message,) = caplog.messages
    assert message.startswith(f"The page of {tmp_path} is left out: ValueError: ") and "metrics.jsonl" in message


def test_a_training_figure_that_cannot_be_drawn_leaves_the_page(real_run, tmp_path, monkeypatch, caplog):
    def failing(*arguments):
        raise TypeError("no figure")

    run = copied(real_run, tmp_path / "run")
    monkeypatch.setattr("trl_entropy.analysis.plots.plot_reward", failing)
    assert write_report_of_finished_run(run) == run / "report" / "index.html"
    assert caplog.messages == ["The figure of the training of run is left out: TypeError: no figure."]


def test_a_diverged_run_has_a_page_and_no_part_is_missing(real_run, tmp_path, caplog):
    """From step 2 on every number is nan, infinite or null, in the lines and in the files."""
    run = copied(real_run, tmp_path / "diverged")
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    lost = itertools.cycle((None, float("nan"), float("inf"), float("-inf")))
    broken = [{key: value if key == "step" else next(lost) for key, value in row.items()} for row in rows[1:]]
    (run / "metrics.jsonl").write_text("".join(to_line(row) + "\n" for row in [rows[0], *broken]))
    for file in [*run.glob("probes/*/step_000002.safetensors"), *run.glob("probes/*/step_000003.safetensors")]:
        save_file({
            name: np.full_like(array, np.nan) if array.dtype.kind == "f" and name != "rewards" else array
            for name, array in load_file(file).items()
        }, file)  # fmt: skip
    records = run / "evaluation" / "step_000003" / "records.parquet"
    table = pd.read_parquet(records)
    table["entropies"] = [np.full(len(given), np.nan) for given in table["entropies"]]
    table.to_parquet(records)
    target = write_page([run], tmp_path / "page.html")
    text = text_of(target)
    assert not caplog.messages and "Missing on this page" not in text
    assert "Left out: 2 of these steps, whose contributions are nan or infinite." in text
    assert ", step 1: " in text and "Not a finite number" in text and "nan%" not in target.read_text()


def test_a_run_without_reward_and_entropy_has_a_page(tmp_path):
    RunDirectory(tmp_path / "loss").append_metrics(1, {"loss": 0.25})
    text = text_of(write_page([tmp_path / "loss"], tmp_path / "page.html"))
    assert "Reward and entropy" not in text and "Missing on this page" not in text
    assert write_report_of_finished_run(tmp_path / "loss").name == "training.png"


def with_rewards(run: Path, change) -> Path:
    for file in run.glob("probes/rollouts/*.safetensors"):
        arrays = load_file(file)
        save_file(arrays | {"rewards": change(arrays["rewards"])}, file)
    return run


def test_answers_are_called_correct_only_where_rewards_are_0_and_1(page, real_run, tmp_path):
    binary = "".join(page.text)
    assert "pass rate" in binary and "group's mean" not in binary
    assert re.search(r"step \d, (correct|incorrect), reward [01]:", binary)
    run = with_rewards(copied(real_run, tmp_path / "any"), lambda rewards: 0.231 + 2 * rewards)
    text = text_of(write_page([run], tmp_path / "page.html"))
    found = text[text.index("Which tokens changed") : text.index("Entropy token by token")]
    assert not re.search(r"(?<!in)\bcorrect\b|incorrect|pass rate", found)
    assert "above the group's mean, rare" in found and "mean reward" in found
    assert re.search(r"step \d, (above|below|at) the group's mean, reward (0.231|2.23):", found)


def share_rows(run: Path, tmp_path, **changed) -> tuple[str, list[str]]:
    """The text of the table of shares, and its keys, after the last line of metrics got other numbers."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rows[-1] |= {f"entropy/{name}": value for name, value in changed.items()}
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = Page(write_page([run], tmp_path / "page.html").read_text())
    return "".join(page.text), [origin["data-key"] for origin, _ in page.numbers]


@pytest.mark.slow
def test_shares_are_tabled_only_where_the_sum_is_well_away_from_0(real_run, tmp_path):
    run = copied(real_run, tmp_path / "run")
    ends = {"mean_delta_all": -0.004, "mean_delta_all_low": -0.005, "mean_delta_all_high": -0.003}
    bounded = {"share_correct_rare_low": -0.1, "share_correct_rare_high": 0.2}
    text, keys = share_rows(run, tmp_path, **ends, **bounded)
    assert "entropy/share_correct_rare" in keys and "here it is not" not in text
    assert "further from 0 than 2 times the half width of its 95 % interval." in text
    text, keys = share_rows(run, tmp_path, **ends | {"mean_delta_all_low": -0.0061, "mean_delta_all_high": -0.0019})
    assert not [key for key in keys if key.startswith("entropy/share_")] and "here it is not" in text
    assert {"entropy/mean_delta_all", "entropy/mean_delta_correct_rare_low"} <= set(keys)


@pytest.mark.slow
def test_one_run_given_twice_is_shown_once(real_run, tmp_path, monkeypatch, capsys):
    run = copied(real_run, tmp_path / "run")
    (tmp_path / "link").symlink_to(run)
    monkeypatch.chdir(tmp_path)
    main([str(run), "run/", "link"])
    assert capsys.readouterr().out.splitlines() == [
        str(run / "report" / name) for name in ("training.png", "index.html")
    ]
    page, figures = render([load_run(run)])
    assert write_page([run, tmp_path / "link"], tmp_path / "page.html").read_text().count("<h1>run</h1>") == 1
    assert len(figures) == len({figure.name for figure in figures}) and page


def test_runs_of_different_settings_have_no_mean_and_the_page_says_so(tmp_path):
    for name, rate in (("slow", 1e-5), ("fast", 1e-3)):
        run = RunDirectory(tmp_path / name)
        run.write_config({"learning_rate": rate, "seed": rate, "output_dir": name, "model_config": {"vocab": 3}})
        run.append_metrics(1, {"reward": rate})
    text = text_of(write_page([tmp_path / "slow", tmp_path / "fast"], tmp_path / "page.html"))
    assert "differ in more than their seeds, so there is no mean over them" in text


def of_one_token(arrays: dict) -> dict:
    """Rows of a probe's file with the first token of each completion alone."""
    width = arrays["completion_mask"].shape[1]
    cut = {name: array[:, :1] for name, array in arrays.items() if array.ndim == 2 and array.shape[1] == width}
    whole = {name: arrays[name][:, : 1 - width] for name in ("input_ids", "attention_mask") if name in arrays}
    return {name: array.copy() for name, array in (arrays | cut | whole).items()}


def test_completions_of_one_token_that_are_attributed_have_a_page(real_run, tmp_path, caplog):
    """As `max_completion_length: 1` leaves them: length and position have one value."""
    run = copied(real_run, tmp_path / "short")
    for file in [*run.glob("probes/attribution/*.safetensors"), *run.glob("probes/rollouts/*.safetensors")]:
        save_file(of_one_token(load_file(file)), file)
    table = attribution_table(load_run(run), by_token=True)
    assert set(table["position"]) == {0} and set(table["length"]) == {1}
    text = text_of(write_page([run], tmp_path / "page.html"))
    assert "Which tokens changed the entropy" in text and "Missing on this page" not in text and not caplog.messages


@pytest.mark.slow
def test_tokens_without_a_tokenizer_are_numbers_and_the_page_says_so(real_run, tmp_path):
    run = copied(real_run, tmp_path / "bare")
    shutil.rmtree(run / "checkpoint-3")
    (run / "probes" / "tokenizer.json").unlink()
    text = text_of(write_page([run], tmp_path / "page.html"))
    assert "tokens stand here as numbers" in text and re.search(r"#\d+#\d+", text)
    text = text_of(write_page([real_run], tmp_path / "page.html"))
    assert "tokens stand here as numbers" not in text and not re.search(r"#\d+#\d+", text)


def test_the_page_says_where_settings_changed(tmp_path):
    run = RunDirectory(tmp_path / "run")
    run.append_start(0, None, {})
    run.append_start(20, tmp_path / "run" / "checkpoint-20", {"learning_rate": (1e-3, 5e-4), "data": ("a", "b")})
    run.append_metrics(21, {"reward": 0.25})
    page = write_page([run.path], tmp_path / "page.html").read_text()
    assert "run was resumed after step 20 with other settings: learning_rate was 0.001 and is 0.0005, data was" in page
    assert page.count("was resumed after") == 1
