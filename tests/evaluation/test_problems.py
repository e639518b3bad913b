"""The held-out problems: a choice, and no question twice."""

import json

import pytest
import yaml
from small_evaluation import CONFIG

from trl_entropy.evaluate import main
from trl_entropy.evaluation.plan import PROFILES, settings_of
from trl_entropy.evaluation.problems import held_out_problems


def settings_with(path, **chosen):
    config = {name: value for name, value in CONFIG.items() if name != "reward_funcs"}
    return settings_of(config | {"task": "gsm8k", "dataset_name": str(path)}, PROFILES["quick"], **chosen)


@pytest.fixture
def write(tmp_path):
    def write(questions):
        records = [{"question": question, "answer": f"#### {number}"} for number, question in enumerate(questions)]
        (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, records)))
        return tmp_path / "data.jsonl"

    return write


def test_a_smaller_selection_is_part_of_a_larger_one(write):
    path = write([f"How many? {number}" for number in range(40)])
    ids = {
        num: [row["prompt_id"] for row in held_out_problems(settings_with(path, num_problems=num), None)]
        for num in (10, 20, 40)
    }
    assert ids[10] == ids[20][:10] and ids[20] == ids[40][:20] and len(set(ids[40])) == 40
    other = held_out_problems(settings_with(path, num_problems=10, seed=1), None)
    assert [row["prompt_id"] for row in other] != ids[10]


def test_a_question_twice_is_refused_before_anything_is_generated(write, tmp_path, monkeypatch):
    monkeypatch.setattr("trl_entropy.evaluate.run_job", lambda *job: pytest.fail("begun"))
    path = write(["How many?", "How much?", "How many?", "How old?", "How old?"])
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(CONFIG | {"task": "gsm8k", "dataset_name": str(path)}))
    with pytest.raises(SystemExit) as ended:
        main(["--run", str(tmp_path)])
    said = str(ended.value)
    told = f"Error: {path} holds 2 held-out questions more than once with other answers or columns"
    assert said.startswith(f"{told}, the first is 'How many?'") and "\n" not in said


def test_a_question_twice_with_the_same_answer_is_evaluated_once(write, caplog):
    path = write(["How many?", "How much?", "How old?"])
    rows = path.read_text().splitlines()
    path.write_text("\n".join([*rows, rows[1], rows[1]]))
    found = held_out_problems(settings_with(path, num_problems=9), None)
    assert sorted(row["question"] for row in found) == ["How many?", "How much?", "How old?"]
    assert f"{path} has 2 held-out questions a second time, which are evaluated once" in caplog.text
