"""The study of the trap: its tables are those of its results, and it goes on where it was stopped."""

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
sys.path.append(str(REPOSITORY / "tests" / "benchmarks"))

import control_study as study  # noqa: E402
import control_study_tables as tables  # noqa: E402
import entropy_control_cell  # noqa: E402

from trl_entropy.config.command_line import parse  # noqa: E402


def run(settings, seed, pass_at_1, seconds=100.0):
    """Half of what it ends at after half of its completions."""
    ends = [
        {"step": 75 * part, "completions": 9600 * part, "seconds": seconds * part / 2, "reward": pass_at_1 * part / 2,
         "pass@1": pass_at_1 * part / 2, "pass@8": 1.0, "entropy": 0.1}
        for part in (1, 2)
    ]  # fmt: skip
    return {
        "task": "trap", "settings": settings, "seed": seed, "steps": 150, "version": "abc", "date": "2026-12-01",
        "unit": 0.5,
        "evaluations": ends, "entropy/policy": [0.5] * 30, "reward": [0.1] * 30,
    }  # fmt: skip


def test_tables_of_the_site_are_those_of_the_results():
    written = study.RESULTS.with_suffix(".md").read_text(encoding="utf-8")
    command = "python tests/benchmarks/control_study.py --report"
    assert tables.report(study.read_runs(study.RESULTS)) == written, f"run `{command}`"


def studied(path, methods, jobs=1, minutes=float("inf")):
    with ThreadPoolExecutor(jobs) as pool:
        return study.study(path, methods, minutes, pool, jobs)


@pytest.mark.parametrize("jobs", [1, 3])
def test_it_goes_on_where_it_was_stopped(tmp_path, monkeypatch, jobs):
    """Each run is made once; one whose line was cut off, again. The better setting goes to the fresh seeds."""
    made = []

    def make(settings, seed):
        made.append((json.dumps(settings), seed))
        return run(settings, seed, settings.get("learning_rate", 0.0) * 1000)

    monkeypatch.setattr(study, "make_run", make)
    monkeypatch.setattr(study, "GROUPS", (("none", "lower learning rate"), ("floor",)))
    path, methods = tmp_path / "trap.jsonl", ["none", "lower learning rate"]
    runs = studied(path, methods, jobs)
    tuned = {"{}", '{"learning_rate": 0.0002}'}
    fresh = [(settings, seed) for settings, seed in made if seed in study.SEEDS]
    assert len(set(made)) == len(made) == 26 and {settings for settings, _ in fresh} == tuned
    assert study.chosen("lower learning rate", runs) == {"learning_rate": 2e-4}
    if jobs == 1:
        assert made[6:] == fresh and [seed for _, seed in fresh] == [seed for seed in study.SEEDS for _ in methods]

    path.write_text(path.read_text(encoding="utf-8")[:-40], encoding="utf-8")
    made.clear()
    again = studied(path, methods, jobs)
    assert len(made) == 1 and again == runs == study.read_runs(path)
    made.clear()
    assert studied(path, methods, jobs) == runs and studied(tmp_path / "none.jsonl", methods, jobs, 0) == {}
    assert not made


def test_a_line_holds_what_a_run_gave(monkeypatch):
    """Of a run that draws more for a step: completions are counted as drawn, and read at those of all methods."""
    entries = [{"step": step, "reward": step / 150, "entropy": 0.12345678, "pass@1": 0.5} for step in (50, 100, 150)]
    logged = {"resampling/num_completions": [256] * 150, "entropy/policy": [0.1] * 150, "reward": [0.2] * 150}
    cell = {"steps": 150, "seconds": [float(step) for step in range(1, 151)], "evaluations": entries, "logged": logged}
    cell["units"] = [0.4, 0.6]
    monkeypatch.setattr(entropy_control_cell, "run_cell", lambda *given: cell)
    line = study.make_run({"resample_uninformative_groups": True}, 10)
    assert [entry["completions"] for entry in line["evaluations"]] == [12_800, 25_600, 38_400]
    assert line["evaluations"][0] == {
        "step": 50, "reward": 0.3333, "entropy": 0.1235, "pass@1": 0.5, "seconds": 50.0, "completions": 12_800
    }  # fmt: skip
    assert line["unit"] == 0.5
    assert study.at_completions(line, "reward") == pytest.approx(0.5, abs=1e-3) and len(line["reward"]) == 30
    assert json.loads(json.dumps(line)) == line and len(json.dumps(line)) < 2000


def test_a_method_that_is_half_tuned_chooses_nothing():
    runs = {study.key_of({"learning_rate": 2e-4}, 1): run({"learning_rate": 2e-4}, 1, 1.0)}
    assert study.chosen("lower learning rate", runs) is None and study.chosen("none", runs) == {}
    assert "lower learning rate" not in tables.fresh_runs(runs)


def test_every_method_can_be_started_and_has_its_place(tmp_path):
    assert sorted(method for group in study.GROUPS for method in group) == sorted(study.METHODS)
    tried = [settings for of_method in study.METHODS.values() for settings in of_method]
    assert len({study.key_of(settings, 0) for settings in tried}) == len(tried)
    for settings in tried:
        task, args, _ = parse(entropy_control_cell.arguments("trap", {"output_dir": tmp_path, **settings}))
        assert task.reward_funcs == ["trap_reward"]
        assert all(getattr(args, name) == value for name, value in settings.items())
        assert args.per_device_train_batch_size * study.num_steps(settings) == study.COMPLETIONS


def test_equal_completions_and_equal_cost_are_read_between_evaluations():
    one = run({}, 10, 0.8)
    assert study.at_completions(one, "pass@1") == 0.8
    assert study.at_completions(one, "pass@1", 14_400) == pytest.approx(0.6)
    assert study.at_cost(one, "pass@1", 2.0) == pytest.approx(0.4)
    assert study.num_steps({"per_device_train_batch_size": 256}) == 75
    none, twice = {10: run({}, 10, 0.0)}, {10: run({}, 10, 0.8, seconds=200.0)}
    assert tables.costs_of({"none": none, "floor": twice}) == {"none": 1.0, "floor": 2.0}
    twice[10]["unit"] = 1.0  # the machine was half as fast
    assert tables.costs_of({"none": none, "floor": twice}) == {"none": 1.0, "floor": 1.0}
    del twice[10]["unit"]
    assert tables.costs_of({"none": none, "floor": twice}) == {"none": 1.0}


def test_sign_flips_and_holm_by_hand():
    assert tables.sign_flip_p([1.0, 1.0, 1.0]) == 2 / 8
    assert tables.sign_flip_p([1.0, -2.0, 4.0]) == 6 / 8  # |sums|: twice each of 1, 3, 5 and 7
    assert tables.sign_flip_p([0.3] * 10) == 2 / 1024
    assert tables.holm({"a": 0.01, "b": 0.04, "c": 0.03}) == pytest.approx({"a": 0.03, "c": 0.06, "b": 0.06})
    assert tables.holm({"a": 0.9, "b": 0.8}) == {"b": 1.0, "a": 1.0}


def test_the_report_counts_pairs_and_seeds(tmp_path):
    """Found on 3 of 4 seeds and on 1 of them: two by it alone, none by the other alone."""
    runs = {}
    for seed, (none, floor) in zip(study.SEEDS, [(0, 1), (1, 1), (0, 1), (0, 0)], strict=False):
        for settings, value in (({}, none), (study.METHODS["floor"][1], floor)):
            runs[study.key_of(settings, seed)] = run(settings, seed, 0.8 * value)
    for seed in study.TUNING_SEEDS:
        for place, settings in enumerate(study.METHODS["floor"]):
            runs[study.key_of(settings, seed)] = run(settings, seed, 0.9 if place == 1 else 0.1)
    text = tables.report(runs)
    assert "| 3 of 4 | 0.75 [0.30, 0.95] |" in text and "| 1 of 4 | 0.25 [0.05, 0.70] |" in text
    assert "| floor | 4 | 2, 0 | 0.40 " in text and "| 0.500 | - |" in text  # no correction: not all seeds are there
    assert "| floor | entropy_control floor, entropy_control_target 0.11 | 0.90, 0.90 | 0.90, 0.90 | yes |" in text
    tables.draw(runs, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000
