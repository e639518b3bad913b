"""The page in headless Chromium: what a reader finds by clicking is what the run's files hold; no messages."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from reporting.chromium import find_chromium
from safetensors.numpy import load_file, save_file

from trl_entropy.reporting import page as page_module
from trl_entropy.reporting.write import write_page
from trl_entropy.runs.directory import RunDirectory

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(find_chromium() is None, reason="no Chromium here: apt-get install chromium"),
]


def page_of(runs: list[Path], target: Path) -> Path:
    """The page without the figures, which take most of the time and which no test here looks at."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(page_module, "sections_of", lambda *arguments: [])
        patch.setattr(page_module, "attribution_section", lambda run: None)
        return write_page(runs, target)


def copied(run: Path, target: Path) -> Path:
    return Path(
        shutil.copytree(run, target, ignore=shutil.ignore_patterns("model.safetensors", "report", "checkpoint-*"))
    )


@pytest.fixture(scope="module")
def pages(real_run, tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    agent = copied(real_run, folder / "agent")
    for file in [*agent.glob("probes/rollouts/*"), *agent.glob("probes/attribution/*")]:
        given = load_file(file)
        own = given["completion_mask"].copy()
        own[:, 3:6] = False
        save_file(given | {"loss_mask": own, "kind": np.zeros(own.shape, dtype=np.uint8)}, file)
    plain = copied(real_run, folder / "plain")
    shutil.rmtree(plain / "probes" / "attribution")
    texts = copied(real_run, folder / "texts")
    shutil.rmtree(texts / "probes")
    RunDirectory(folder / "empty").append_metrics(1, {"loss": 0.25})
    runs = {
        "whole": [real_run], "agent": [agent], "without attribution": [plain], "texts": [texts],
        "killed": [real_run.parent / "killed" / real_run.name], "empty": [folder / "empty"], "two": [real_run, agent],
    }  # fmt: skip
    return {name: page_of(given, folder / f"{name}.html") for name, given in runs.items()}


def lowest(run: Path, step: int) -> tuple[int, int, dict[str, np.ndarray]]:
    """The completion and its token that lowered the entropy most, read with nothing of the package."""
    given = load_file(run / "probes" / "attribution" / f"step_{step:06d}.safetensors")
    row = int(given["attribution"].sum(1).argmin())
    return row, int(given["attribution"][row].argmin()), given


def shown(text: str) -> float:
    return float(text.split("±")[0].split(" nats")[0].replace("−", "-").replace("+", "").strip())


def test_from_a_step_to_a_token_in_four_clicks(browser, pages, real_run):
    browser.look(1280, 900)
    browser.open(pages["whole"])
    rows = [json.loads(line) for line in (real_run / "metrics.jsonl").read_text().splitlines()]
    logged = {row["step"]: row["entropy/delta_measured"] for row in rows if "entropy/delta_measured" in row}
    steps = browser.texts("main table:not(details table) tbody tr td:first-child")
    assert steps == ["1", "2", "3"]
    for step, text in zip(steps, browser.texts("main table:not(details table) tbody tr td:nth-child(2)"), strict=True):
        assert shown(text) == pytest.approx(logged[int(step)], rel=6e-3)
    browser.click("main td a", 1)
    assert browser.text("h2") == "Step 2"
    row, token, given = lowest(real_run, 2)
    group = int(given["prompt_index"][row])
    browser.click(f'main td a[href$="group={group}"]')
    assert browser.text("h2") == f"Group {group} of step 2"
    browser.click(f'main td a[href$="row={row}"]')
    assert browser.text("h2") == f"Completion {row} of step 2"
    change = browser.text('dl.facts [data-name="change"] dd')
    assert shown(change) == pytest.approx(given["attribution"][row].astype(float).sum(), rel=6e-3)
    browser.click(f'[data-place="{token}"]')
    assert browser.run("location.hash").endswith(f"row={row}&token={token}")
    for name, key in (("change", "attribution"), ("entropy", "entropy"), ("logp", "logps")):
        number = browser.text(f'.panel [data-name="{name}"] dd')
        assert shown(number.split()[0]) == pytest.approx(float(given[key][row, token]), rel=6e-3)
    browser.press("Escape")
    browser.press("Escape")
    assert browser.text("h2") == f"Group {group} of step 2"
    browser.click(".way a", 0)
    assert browser.text("h2") == "Steps"
    assert not browser.messages and set(browser.requests) == {pages["whole"].as_uri()}


def test_the_links_to_what_lowered_the_entropy_most(browser, pages, real_run):
    """Which step, which completion, which token: three clicks from the first view."""
    browser.open(pages["whole"])
    browser.click(".sentences a")
    step = int(browser.run("new URLSearchParams(location.hash.slice(1)).get('step')"))
    row, _, given = lowest(real_run, step)
    assert browser.text(".extremes a:nth-of-type(2)") == f"completion {row}"
    best = np.unravel_index(given["attribution"].argmin(), given["attribution"].shape)
    browser.click(".extremes a", 2)
    assert browser.run("location.hash").endswith(f"row={best[0]}&token={best[1]}")
    assert "part of the entropy change" in browser.text(".panel")
    assert not browser.messages


def test_pointing_at_a_step_shows_its_numbers_on_every_chart(browser, pages):
    browser.look(1280, 900)
    browser.open(pages["whole"])
    assert not "".join(browser.texts(".chart .at"))
    box = browser.run("(() => { const e = document.querySelector('.chart svg'); e.scrollIntoView({block: 'center'});"
                      "const b = e.getBoundingClientRect();"
                      "return [b.right - b.width * 12 / 460, b.y + 60] })()")  # fmt: skip
    browser.move_to(*box)
    places = browser.texts(".chart .at")
    evaluated = [text for text in browser.texts(".chart") if text.startswith("Held-out")]
    assert len(places) > 4 and len(evaluated) == 2, (box, places)
    assert {"step 3"} <= set(places) <= {"step 3", "step 0"}, (box, browser.run("innerHeight"))
    assert "±" in " ".join(browser.texts(".keys .value"))
    browser.click_at(*box)
    assert browser.run("location.hash") == "#pin=3" and "Step 3 is pinned" in browser.text(".pinned")
    browser.move_to(5, 5)
    assert browser.texts(".chart .at") == places
    browser.click(".pinned a")
    assert browser.text("h2") == "Step 3" and not browser.messages


def test_the_parts_of_a_step_add_up(browser, pages, real_run):
    browser.open(f"{pages['whole'].as_uri()}#step=3")
    ends = browser.run("[...document.querySelectorAll('.bars .bar')].map(e => { const b = e.getBoundingClientRect();"
                       "return [e.className, b.left, b.right] })")  # fmt: skip
    zero = browser.run("document.querySelector('.bars .zero').getBoundingClientRect().left")
    parts, whole = ends[:-1], ends[-1]
    assert whole[0].endswith("whole") and len(parts) >= 4
    at = zero
    for name, left, right in (part for part in parts if not part[0].endswith("whole")):
        assert min(abs(at - left), abs(at - right)) < 4, name
        at = left if abs(at - right) <= abs(at - left) else right
    assert min(abs(at - whole[1]), abs(at - whole[2])) < 6


def test_why_a_group_was_dropped(browser, pages, real_run):
    for step in (1, 2, 3):
        given = load_file(real_run / "probes" / "rollouts" / f"step_{step:06d}.safetensors")
        for group in np.unique(given["prompt_index"]):
            own = given["rewards"][given["prompt_index"] == group]
            browser.open(f"{pages['whole'].as_uri()}#step={step}&group={group}")
            said = "Dropped from the gradient: all 4 rewards are" in browser.text("main")
            assert said == bool((own == own[0]).all())
    assert not browser.messages


@pytest.mark.parametrize("name", ["whole", "agent", "without attribution", "texts", "killed", "empty", "two"])
def test_every_view_of_every_run_is_drawn_without_a_message(browser, pages, name):
    browser.messages.clear()
    browser.open(pages[name])
    address, seen = pages[name].as_uri(), []
    assert "No numbers" not in browser.text("main") and browser.text("main")
    if name == "two":
        assert "2 runs" in browser.text("h2") and browser.texts(".chart")
        assert "Where two runs part" in browser.text("main")
        browser.click("main li a", 1)
        assert browser.text(".way a[aria-current]") == "agent"
    if name == "empty":
        assert not browser.texts("main tbody a") or browser.texts("main tbody a") == ["1"]
        browser.open(f"{address}#step=1")
        assert "are not on this page" in browser.text("main")
    else:
        for _ in range(3):
            if not browser.run("!!document.querySelector('main td a')"):
                break
            browser.click("main td a", 1)
            seen.append(browser.text("h2"))
        assert [text.split()[0] for text in seen] == ["Step", "Group", "Completion"], seen
    if name == "agent":
        assert "A tool or the environment wrote: 3 tokens" in browser.text("main")
    for name_of_view in ("#find=apple", "#step=99", "#step=2&group=99", "#step=2&row=99", "#step=x&run=7"):
        browser.open(address + name_of_view)
        assert browser.text("main")
    assert not browser.messages


def test_finding_a_text(browser, pages, real_run):
    browser.open(pages["whole"])
    browser.run("document.getElementById('find').value = 'How many'; document.querySelector('form').requestSubmit()")
    browser.settle()
    number = int(browser.text("h2").split()[-2])
    assert number == len(browser.texts(".found li")) >= 12 and browser.texts(".found mark")[0] == "How many"


@pytest.mark.parametrize("width", [400, 1280, 2560])
def test_no_view_is_wider_than_the_window(browser, pages, width):
    browser.look(width, 900, dark=width == 1280)
    for name, place in (("whole", ""), ("whole", "#step=2"), ("agent", "#step=2&row=1&token=1"), ("two", "")):
        browser.open(pages[name].as_uri() + place)
        assert browser.run("document.documentElement.scrollWidth - innerWidth") <= 0, (name, place)
        assert browser.run(_OVERLAPS) == [], (name, place)
    browser.look(1280, 900)


# Pairs of texts that stand over one another, but for the panel, which stays in sight above what it covers.
_OVERLAPS = """(() => {
  const boxes = [...document.querySelectorAll("h2, h3, p, summary, th button, td, figcaption strong, .keys li, .save,"
    + " .way a, .facts dd, .facts dt, .bars span.name, .bars span.value, .chart text")]
    .filter(e => e.checkVisibility() && e.textContent.trim() && !e.closest("#static, .panel"))
    .map(e => {
      const range = document.createRange();
      range.selectNodeContents(e);
      const box = range.getBoundingClientRect(), cell = e.getBoundingClientRect();
      return [e, e.matches("td") ? { ...box.toJSON(), bottom: Math.min(box.bottom, cell.bottom) } : box];  // cut texts
    });
  const found = [];
  boxes.forEach(([a, p], i) => boxes.slice(i + 1, i + 60).forEach(([b, q]) => {
    const x = Math.min(p.right, q.right) - Math.max(p.left, q.left);
    const y = Math.min(p.bottom, q.bottom) - Math.max(p.top, q.top);
    const apart = x <= 3 || y <= 3 || a.contains(b) || b.contains(a);
    if (!apart) found.push(`${a.textContent.slice(0, 30)} | ${b.textContent.slice(0, 30)}`);
  }));
  return found;
})()"""


def test_a_chart_is_kept_as_svg_and_csv(browser, pages, real_run):
    browser.open(pages["whole"])
    browser.run("window.kept = []; URL.createObjectURL = blob => { blob.text().then(t => kept.push(t)); return '#' }")
    browser.run(
        "HTMLAnchorElement.prototype.click = () => {};"
        "document.querySelectorAll('.chart .save').forEach(e => e.click())"
    )
    browser.settle()
    csv, drawing = browser.run("window.kept.slice(0, 2)")
    rows = [line.split(",") for line in csv.splitlines()]
    assert rows[0][:2] == ["series", "step"] and [row[1] for row in rows[1:4]] == ["1", "2", "3"]
    assert drawing.startswith("<svg") and 'xmlns="http://www.w3.org/2000/svg"' in drawing and "var(" not in drawing


def test_keys_and_colours(browser, pages):
    browser.look(1280, 900, dark=True)
    browser.open(f"{pages['whole'].as_uri()}#step=1")
    dark = browser.run("getComputedStyle(document.body).backgroundColor")
    browser.press("t")
    assert browser.run("getComputedStyle(document.body).backgroundColor") != dark
    browser.press("ArrowRight")
    assert browser.text("h2") == "Step 2"
    browser.press("ArrowLeft")
    assert browser.text("h2") == "Step 1" and not browser.messages
    browser.look(1280, 900)


def test_prices_are_a_scatter_and_a_table_of_what_the_run_logged_last(real_run, tmp_path, browser):
    """A category without bounds has no price, and its point is hollow; the line is the price of all."""
    run = copied(real_run, tmp_path / "priced")
    lines = (run / "metrics.jsonl").read_text().splitlines()
    last, added = json.loads(lines[-1]), {}
    parts = {"correct": (-0.002, 0.01, 0.2, (0.1, 0.4)), "turn_2": (0.001, 0.002, -0.5, (None, None)),
             "all": (-0.001, 0.012, 0.0833, (0.05, 0.2))}  # fmt: skip
    for name, (change, earned, price, (low, high)) in parts.items():
        for key, value in ((f"entropy/mean_delta_{name}", change), (f"reward/mean_delta_{name}", earned)):
            added |= {key: value, f"{key}_low": value - 0.001, f"{key}_high": value + 0.001}
        key = f"reward/price_{name}"
        added |= {key: price, f"{key}_low": low, f"{key}_high": high}
    (run / "metrics.jsonl").write_text("\n".join([*lines[:-1], json.dumps(last | added)]) + "\n")
    browser.open(page_of([run], tmp_path / "priced.html"))
    rows = {row.split("\t")[1]: row.split("\t")[2:] for row in browser.texts("[aria-label=Prices] tbody tr")}
    assert rows["advantage above 0"] == ["0.002 [0.001, 0.003]", "0.01 [0.009, 0.011]", "0.2 [0.1, 0.4]"]
    assert rows["turn 2"][2] == "none" and rows["all"][2] == "0.0833 [0.05, 0.2]"
    fills = browser.run("[...document.querySelectorAll('[aria-label=Prices] circle')].map((one) => one.style.fill)")
    assert len(fills) == 3 and ["paper" in fill for fill in fills].count(True) == 1
    assert browser.run("document.querySelectorAll('[aria-label=Prices] path[style*=dasharray]').length") == 1
    assert browser.messages == []
