"""A page that follows its runs: the server answers what it must and nothing else, and what is new is joined."""

import http.client
import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from urllib.parse import urlsplit

import pytest
from reporting.chromium import Chromium, find_chromium

from trl_entropy.analysis.progress import Progress, duration, progress_of
from trl_entropy.analysis.run import load_run
from trl_entropy.report import main as report
from trl_entropy.reporting.columns import decoded
from trl_entropy.reporting.following import Followed
from trl_entropy.reporting.server import serving
from trl_entropy.reporting.terminal import ASCII, Look, cut, screen, sparkline
from trl_entropy.runs.directory import RunDirectory
from trl_entropy.runs.lock import LOCK, locked, training_of
from trl_entropy.watch import main as watch


@pytest.fixture
def run(tmp_path) -> RunDirectory:
    """A run of two steps of four, one measured, that nobody trains."""
    run = RunDirectory(tmp_path / "growing")
    run.write_config({"max_steps": 4})
    for step in (1, 2):
        run.append_metrics(step, {"reward": 0.25 * step, "entropy/policy": 1.0 / step})
    change = {"measured": -0.02, "linear": -0.03, "momentum": -0.02, "gradient": -0.01}
    run.append_later(1, {f"entropy/delta_{name}": value for name, value in change.items()})
    return run


def asked(address: str, place: str = "", **headers: str) -> tuple[int, str]:
    """Status and text of an answer."""
    request = urllib.request.Request(address + place, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_a_reader_gets_the_steps_that_have_changed(run):
    followed = Followed([run.path])
    first = followed.since(0)
    assert first["reset"] and decoded(first["runs"][0]["steps"])["step"] == [1, 2]
    assert followed.since(first["version"]) is None
    run.append_metrics(3, {"reward": 0.75})
    run.append_later(2, {"entropy/delta_measured": 0.5})
    second = followed.since(first["version"])
    steps = decoded(second["runs"][0]["steps"])
    assert not second["reset"] and steps["step"] == [2, 3] and steps["entropy/delta_measured"] == [0.5, None]
    assert decoded(second["runs"][0]["parts"])["step"] == []
    assert decoded(followed.since(0)["runs"][0]["steps"])["step"] == [1, 2, 3]
    assert followed.since(second["version"]) is None and followed.since(first["version"]) is not None


def test_steps_that_a_resumption_takes_back_are_gone(run):
    followed = Followed([run.path])
    version = followed.since(0)["version"]
    run.replace_metrics([{"step": 1, "reward": 0.25}])
    answer = followed.since(version)
    assert answer["reset"] and decoded(answer["runs"][0]["steps"])["step"] == [1]


def test_a_run_without_a_step_is_waited_for(tmp_path):
    (tmp_path / "new").mkdir()
    followed = Followed([tmp_path / "new"])
    first = followed.since(0)
    assert first["runs"][0]["steps"]["rows"] == 0 and first["runs"][0]["progress"] == "no step yet"
    RunDirectory(tmp_path / "new").append_metrics(1, {"loss": 0.5})
    assert decoded(followed.since(first["version"])["runs"][0]["steps"]) == {"step": [1], "loss": [0.5]}


def test_the_steps_of_a_real_run_are_those_of_the_file(real_run):
    followed = Followed([real_run])
    page = followed.since(0)
    assert set(page["runs"][0]["shown"]) == {"1", "2", "3"} and page["runs"][0]["binary"] and not page["gaps"]
    step = followed.step(0, 2)
    assert step["groups"]["rows"] == 4 and step["tokens"]["rows"] > 100 and step["measured_tokens"]["rows"] > 50
    assert followed.step(0, 99) is None and followed.step(1, 2) is None


def test_the_server_answers_to_its_word_and_its_names_alone(run):
    (run.path.parent / "secret.txt").write_text("secret")
    with serving([run.path]) as address:
        parts = urlsplit(address)
        assert parts.hostname == "127.0.0.1" and len(parts.path) > 30
        status, text = asked(address)
        assert status == 200 and "connect-src 'self'" in text and "growing" in text
        assert parts.path not in text  # the word is in the address alone
        base = f"http://127.0.0.1:{parts.port}"
        for place in ("", "/", "/new?version=0", "/x" + parts.path, parts.path.upper(), parts.path[:-2] + "/"):
            assert asked(base + place)[0] == 404, place
        for place in (
            "metrics.jsonl", "../secret.txt", "..%2fsecret.txt", "%2e%2e/secret.txt", "/etc/passwd", "step?name=0-1",
            "step?name=../0", "step?name=0-1-zz", "new", "new?version=-1", "new?version=x", "report/index.html",
        ):  # fmt: skip
            status, text = asked(address, place)
            assert status == 404 and not text.replace("There is nothing here.", ""), place
        for host in ("evil.example", "evil.example:80", "127.0.0.1.evil.example", "localhost.evil.example", ""):
            assert asked(address, Host=host)[0] == 421, host
        for host in ("localhost:9000", "127.0.0.1", "LOCALHOST", "[::1]:8000"):  # the other end of a tunnel
            assert asked(address, Host=host)[0] == 200, host
        before = sorted(path.name for path in run.path.rglob("*"))
        for method in ("POST", "PUT", "DELETE", "PATCH", "OPTIONS"):
            connection = http.client.HTTPConnection("127.0.0.1", parts.port, timeout=10)
            connection.request(method, parts.path, body=b"x")
            assert connection.getresponse().status == 501
            connection.close()
        assert sorted(path.name for path in run.path.rglob("*")) == before  # nothing is written


def test_the_server_says_what_is_new(run):
    with serving([run.path]) as address:
        text = asked(address)[1]
        block = re.search(r'id="data-page">(.*?)</script>', text, re.DOTALL)[1]
        version = json.loads(block)["version"]
        assert asked(address, f"new?version={version}") == (204, "")
        run.append_metrics(3, {"reward": float("nan")})
        status, text = asked(address, f"new?version={version}")
        assert status == 200 and decoded(json.loads(text)["runs"][0]["steps"])["reward"] == [None]
        with urllib.request.urlopen(urllib.request.Request(address, headers={"Accept-Encoding": "gzip"})) as answer:
            assert answer.headers["Content-Encoding"] == "gzip" and answer.headers["Referrer-Policy"] == "no-referrer"


def test_whether_a_run_goes_on(run):
    assert training_of(run.path) == "none" and str(progress_of(load_run(run.path))) == "ended after step 2 of 4"
    with locked(run.path):
        assert training_of(run.path) == "running"
        assert str(progress_of(load_run(run.path))) == "running, step 2 of 4"
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    told = {"pid": ended.pid, "host": socket.gethostname(), "since": "now"}
    (run.path / LOCK).write_text(json.dumps(told))
    assert str(progress_of(load_run(run.path))) == "killed after step 2 of 4"
    (run.path / LOCK).write_text(json.dumps(told | {"host": "another"}))
    progress = progress_of(load_run(run.path))
    assert progress.goes_on and str(progress).startswith("on another machine, or not known whether it runs, step 2")
    (run.path / LOCK).write_text("{")
    assert training_of(run.path) == "unknown"


def test_the_time_that_is_left(run):
    run.append_start(0, None, {})
    (start,) = run.starts()
    began = time.mktime(time.strptime(start["time"][:19], "%Y-%m-%dT%H:%M:%S"))
    os.utime(run.metrics_path, (began + 30, began + 30))
    with locked(run.path):
        progress = progress_of(load_run(run.path))
    assert progress == Progress("running", 2, 4, 15.0) and progress.seconds_left == 30
    assert str(progress) == "running, step 2 of 4, 15 s a step, about 30 s left"
    run.write_config({"max_steps": -1, "num_train_epochs": 3.0})
    run.append_metrics(2, {"epoch": 0.25})
    assert progress_of(load_run(run.path)).num_steps == 24
    assert [duration(one) for one in (7.6, 61, 3700)] == ["8 s", "1 min 1 s", "1 h 1 min"]


def test_the_terminal_shows_the_run(run, capsys):
    run.append_metrics(3, {"entropy/policy": 0.1, "reward": float("nan"), "grad_norm": float("nan")})
    watch([str(run.path)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["growing", "ended after step 3 of 4"]
    entropy = next(line for line in lines if line.startswith("entropy  "))
    assert entropy.split() == ["entropy", "0.1", "█▄▁"]
    assert "Step 1 changed the entropy by -0.02 nats per token" in lines
    bars = {line.split()[0]: line for line in lines if "|" in line}
    assert set(bars) == {"momentum", "gradient", "curvature"}
    assert bars["momentum"].count("█") == pytest.approx(2 * bars["gradient"].count("█"), abs=1)
    assert bars["gradient"].rstrip().endswith("█|") and "|█" in bars["curvature"]
    assert any(re.fullmatch(r"\d warnings?; the page says what to do", line) for line in lines)
    assert "  Not a finite number: step 3" in lines
    lines = screen(load_run(run.path), Look(60, styled=True, **ASCII))
    assert all(len(cut(line, 60).replace("\x1b[1m", "").replace("\x1b[0m", "")) <= 60 for line in lines)
    assert lines[0] == "\x1b[1mgrowing\x1b[0m" and not re.search("[▁-█]", "".join(lines))


def test_curves_keep_their_ends_and_their_gaps():
    assert sparkline([0.0, float("nan"), 1.0], 10, "01234567") == "0 7"
    assert sparkline(list(range(16)), 4, "0123") == "0123" and sparkline([2.0, 2.0], 9, "012") == "11"
    assert sparkline([], 5, "01") == "" and sparkline([float("nan")] * 3, 5, "01") == ""


def test_a_run_without_a_step_in_the_terminal(tmp_path, capsys):
    (tmp_path / "new").mkdir()
    watch([str(tmp_path / "new")])
    assert capsys.readouterr().out.splitlines() == ["new", "no step yet", "", "No step is written yet."]


@pytest.mark.parametrize("command, words, said", [
    (watch, ["nowhere"], "There is no directory nowhere"),
    (report, ["nowhere", "--watch"], "There is no directory nowhere"),
    (report, [".", "--watch", "--port", "99999"], "--port 99999 cannot be used"),
    (report, [".", "--watch", "--figures"], "leave --output and --figures out"),
    (watch, [".", "--every", "0"], "--every 0 is not above 0"),
])  # fmt: skip
def test_mistakes_end_in_one_line(command, words, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        command(words)
    assert said in f"{stop.value.code}{capsys.readouterr().err}"


@pytest.mark.browser
@pytest.mark.skipif(find_chromium() is None, reason="no Chromium here: apt-get install chromium")
def test_the_page_grows_with_the_run(real_run, run, browser: Chromium):
    with serving([run.path], every=0.1) as address:
        browser.open(address)
        rows = "main table:not(details table) tbody tr td:first-child"
        assert browser.texts(rows) == ["1"] and browser.text(".live") == "ended after step 2 of 4"
        browser.run("document.querySelector('main input').click()")
        assert browser.texts(rows) == ["1", "2"]
        browser.click(".chart svg")  # the pointer stays there
        pointed = browser.texts(".chart .at")
        browser.run("document.querySelector('main h2').dataset.old = 1")
        run.append_metrics(3, {"reward": 0.75, "entropy/policy": 0.3})
        browser.wait_for("!document.querySelector('main h2').dataset.old")
        assert browser.texts(rows) == ["1", "2", "3"] and browser.text(".live") == "ended after step 3 of 4"
        assert any(pointed) and browser.texts(".chart .at") == pointed
        assert not browser.messages
    browser.wait_for("document.querySelector('.live.silent')")
    assert "the server does not answer" in browser.text(".live") and browser.texts(rows) == ["1", "2", "3"]
    browser.messages.clear()  # of the refused connection
    with serving([real_run, run.path]) as address:
        browser.open(address + "#run=0&step=2")
        browser.wait_for("document.querySelector('main td a')")
        browser.click("main td a", 1)
        assert browser.text("h2").startswith("Group ")
        browser.open(address + "#run=0&find=How%20many")
        browser.wait_for("document.querySelectorAll('.found li').length > 11")
        assert not browser.messages
