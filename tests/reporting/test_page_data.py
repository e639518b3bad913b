"""The data of the page: a schema, what is left out where there is no room, and texts that stay texts."""

import json
import math
import re
import shutil

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trl_entropy.analysis.run import load_run
from trl_entropy.analysis.view_columns import COLUMNS
from trl_entropy.analysis.views import view
from trl_entropy.reporting.columns import decoded, encoded, rounded
from trl_entropy.reporting.gaps import Gaps
from trl_entropy.reporting.inline import modules, script, script_hash
from trl_entropy.reporting.page_data import MOST_CHARACTERS, as_text, page_blocks
from trl_entropy.reporting.selection import choose, common_ends
from trl_entropy.reporting.write import write_page
from trl_entropy.runs.directory import RunDirectory

HOSTILE = "</script><script>alert(1)</script><!--<script>\u202e\u2028\x00\x1b[31m&lt;]]>"


def blocks_of(path, **given) -> dict:
    run = load_run(path)
    gaps = Gaps()
    blocks = page_blocks([run], {run.name: run.config}, gaps, **given)
    assert not gaps.sentences
    return {block.name: json.loads(block.text) for block in blocks}


@pytest.fixture(scope="module")
def blocks(real_run):
    return blocks_of(real_run)


def close(first, second) -> bool:
    if isinstance(second, float):
        return first is None if not math.isfinite(second) else math.isclose(first, second, rel_tol=6e-3)
    return first == second or (first is None and pd.isna(second)) or bool(first) == second


def test_the_blocks_hold_the_views(blocks, real_run):
    run = load_run(real_run)
    page = blocks["page"]
    assert (
        page["format"] == 1 and set(page["columns"]) == set(COLUMNS) and set(blocks) == {"page", "0-1", "0-2", "0-3"}
    )
    assert page["runs"][0]["shown"] == {"1": "0-1", "2": "0-2", "3": "0-3"} and page["runs"][0]["binary"]
    for name in ("steps", "parts"):
        assert same(page["runs"][0][name], view(run, name))
    for name in ("groups", "completions", "tokens", "measured_completions", "measured_tokens"):
        given = blocks["0-2"][name]
        assert same(given, view(run, name, 2)), name
    first, last = blocks["0-2"]["prompt_ends"]
    texts = [first + text + last for text in decoded(blocks["0-2"]["groups"])["prompt"]]
    assert texts == view(run, "groups", 2)["prompt"].tolist()


def same(given: dict, table: pd.DataFrame) -> bool:
    found = decoded(given)
    assert (given["rows"] == len(table) and len(found) >= 3) or "prompt" in found
    names = [name for name in table if name in found and name != "prompt"]
    left_out = {"token_id", "position", "prompt"}
    assert {name for name in table if name not in found} <= left_out
    return all(
        close(one, other) for name in names for one, other in zip(found[name], table[name].tolist(), strict=True)
    )


def runs_of(tmp_path, **settings) -> dict:
    """The first block of two runs whose `seed`s differ, and of which the second has these settings too."""
    for seed, more in ((1, {}), (2, settings)):
        run = RunDirectory(tmp_path / f"seed {seed}")
        run.write_config({"seed": seed, "beta": 0.0} | more)
        for step in (1, 2, 3):
            run.append_metrics(step, {"reward": 0.25 * seed + step})
    RunDirectory(tmp_path / "seed 1").append_metrics(4, {"reward": 9.0})
    runs = [load_run(tmp_path / f"seed {seed}") for seed in (1, 2)]
    gaps = Gaps()
    blocks = page_blocks(runs, {run.name: run.config for run in runs}, gaps)
    assert not gaps.sentences
    return json.loads(blocks[0].text)


def test_runs_that_differ_in_the_seed_have_a_mean_and_others_have_not(tmp_path):
    page = runs_of(tmp_path / "same")
    assert page["differences"] == [["seed", "1", "2"]]
    mean = decoded(page["means"]["reward"])
    assert mean["step"] == [1, 2, 3] and mean["mean"] == [1.375, 2.375, 3.375] and mean["num_runs"] == [2, 2, 2]
    assert mean["half"] == [pytest.approx(12.7062 * 0.125, rel=1e-3)] * 3  # Student's t with one degree of freedom
    page = runs_of(tmp_path / "other", beta=0.1)
    assert page["means"] == {} and ["beta", "0.0", "0.1"] in page["differences"]


@given(st.lists(st.sampled_from([0.0, 1.5, -2.25e-7, math.nan, math.inf, 3.0]), max_size=40))
def test_columns_of_numbers_come_back(values):
    table = pd.DataFrame({"change": values, "row": range(len(values))})
    found = decoded(json.loads(as_text(encoded("tokens", table))))
    assert found["row"] == list(range(len(values)))
    assert found["change"] == [rounded(value, 3) for value in values]


@given(st.lists(st.one_of(st.none(), st.text(max_size=4)), max_size=30))
def test_columns_of_texts_come_back(values):
    table = pd.DataFrame({"token": pd.Series(values, dtype=object)})
    assert decoded(json.loads(as_text(encoded("tokens", table))))["token"] == values


def test_numbers_keep_their_digits():
    assert rounded(-1.23456e-5, 3) == -1.23e-05 and rounded(123456.0, 4) == 123500 and rounded(7.0, 0) == 7
    assert rounded(math.nan, 4) is None and rounded(-math.inf, 4) is None


@given(st.text(max_size=60))
def test_json_on_the_page_is_text(text):
    written = as_text({"a": text + HOSTILE})
    assert json.loads(written) == {"a": text + HOSTILE}
    assert not re.search(r"[<>&\u2028\u2029\u202e\x00-\x1f]", written)


def test_planted_texts_cannot_end_the_script(real_run, tmp_path, monkeypatch):
    monkeypatch.setattr("trl_entropy.reporting.page.sections_of", lambda *arguments: [])  # figures take long
    run = tmp_path / "hostile"
    shutil.copytree(real_run, run, ignore=shutil.ignore_patterns("model.safetensors", "report"))
    shutil.rmtree(run / "probes")
    for file in run.glob("completions/*.parquet"):
        table = pd.read_parquet(file)
        table["completion"], table["prompt"] = HOSTILE, HOSTILE + table["prompt"]
        table.loc[0, "completion"] = "x" * 200_000
        table.to_parquet(file)
    text = write_page([run], tmp_path / "page.html").read_text()
    blocks = re.findall(r'<script type="application/json" id="data-([\w-]+)">(.*?)</script>', text, re.DOTALL)
    name, shown = next((name, json.loads(block)) for name, block in blocks if name != "page")
    texts = decoded(shown["completions"])["text"]
    assert HOSTILE in texts and max(map(len, texts)) < MOST_CHARACTERS + 100, name
    assert any("180000 characters left out" in given for given in texts)
    assert text.count("<script") == text.count("</script>") == len(blocks) + 1
    assert "\u202e" not in text and "\x00" not in text


def test_what_is_left_out_has_the_smallest_effect_and_is_said(real_run):
    run = load_run(real_run)
    whole, said = choose(run, 10**7, Gaps())
    assert not said and all(len(table.rows) == len(table.completions) for table in whole)
    tables, said = choose(run, 12_000, Gaps())
    kept = [(abs(table.completions["change"]), table.rows) for table in tables]
    inside = [float(effects[row]) for effects, rows in kept for row in rows]
    outside = [float(effects[row]) for effects, rows in kept for row in effects.index if row not in rows]
    assert inside and outside and min(inside) >= max(outside)
    assert (
        len(said) == 1 and f"the tokens of {len(inside)} of these {len(inside) + len(outside)} completions" in said[0]
    )


def test_steps_that_have_no_room_are_those_with_the_smallest_change(real_run):
    run = load_run(real_run)
    tables, said = choose(run, 3_500, Gaps())
    changes = run.steps["entropy/delta_measured"].abs()
    assert [table.step for table in tables] == [3] or set(changes.drop(3).nlargest(len(tables) - 1).index) <= {
        table.step for table in tables
    }
    assert 0 < len(tables) < 3 and "steps that the run keeps are on this page" in said[0]


@pytest.mark.parametrize("most", [20_000, 60_000])
def test_the_room_is_kept_to(real_run, most):
    run = load_run(real_run)
    blocks = page_blocks([run], {run.name: run.config}, Gaps(), most_bytes=most)
    assert sum(len(block.text.encode()) for block in blocks[1:]) < most + 10_000


def test_prompts_share_their_beginning_and_end_in_whole_words():
    texts = ["Solve it.\nQ: one apple more?\nA:", "Solve it.\nQ: two apples more?\nA:"]
    assert common_ends(texts) == ("Solve it.\nQ: ", " more?\nA:")
    assert common_ends(["a b", "a b"]) == ("", "") and common_ends([]) == ("", "") and common_ends(["x"]) == ("", "")
    for texts in (["same ", "same same "], ["a a", "a a a"]):
        first, last = common_ends(texts)
        assert all(text.startswith(first) and text[len(first) :].endswith(last) for text in texts)


def test_the_script_is_of_all_modules_and_closes_nothing():
    text = script()
    assert modules()[-1] == "main.js" and len(modules()) == len(set(modules())) > 10
    assert "</script" not in text and "<!--" not in text and not re.search(r"^(import|export) ", text, re.MULTILINE)
    assert script_hash().startswith("sha256-") and "eval(" not in text
