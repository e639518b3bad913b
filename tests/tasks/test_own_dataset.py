"""The user's own problems: files, folders, functions; columns, templates, filters; every mistake in one line."""

import json
from pathlib import Path

import pandas as pd
import pytest
from datasets import Dataset, DatasetDict

from trl_entropy.tasks.arguments import TaskArguments
from trl_entropy.tasks.own_dataset import is_on_the_hub
from trl_entropy.tasks.r1_template import format_prompt
from trl_entropy.tasks.registry import load_task

FILE = Path(__file__).with_name("own_functions.py")
ROWS = [
    {"question": f"What is {number} + 1?", "solution": str(number + 1), "level": number % 2} for number in range(60)
]
COLUMNS = {"prompt_column": "question", "answer_column": "solution"}


def load(name, **settings):
    return load_task(TaskArguments(dataset_name=str(name), **settings), None, seed=0)


def write(folder, kind):
    path, table = folder / f"rows.{kind}", pd.DataFrame(ROWS)
    if kind == "jsonl":
        path.write_text("\n".join(map(json.dumps, ROWS)) + "\n")
    elif kind == "json":
        path.write_text(json.dumps(ROWS))
    elif kind == "parquet":
        table.to_parquet(path)
    else:
        table.to_csv(path, index=False, sep="\t" if kind == "tsv" else ",")
    return path


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "tsv", "parquet"])
def test_every_kind_of_file_holds_out_the_same_prompts(tmp_path, kind):
    train, test = load(write(tmp_path, kind), **COLUMNS)
    assert len(train) + len(test) == 60 and 1 <= len(test) <= 15
    assert {*train["prompt"]}.isdisjoint(test["prompt"]) and {*train["prompt_id"]}.isdisjoint(test["prompt_id"])
    assert train[0]["answer"] == ROWS[0]["solution"] and "level" in train.column_names
    again, _ = load(write(tmp_path, "jsonl"), **COLUMNS)
    assert train["prompt_id"] == again["prompt_id"]


def test_a_file_for_each_split_a_saved_dataset_and_a_function(tmp_path):
    for name, rows in (("train", ROWS[:40]), ("test", ROWS[40:])):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    saved = DatasetDict(train=Dataset.from_list(ROWS[:40]), validation=Dataset.from_list(ROWS[40:]))
    saved.save_to_disk(str(tmp_path / "saved"))
    of_files = load(tmp_path, **COLUMNS)
    of_saved = load(tmp_path / "saved", dataset_test_split="validation", **COLUMNS)
    assert [dataset["prompt"] for dataset in of_files] == [dataset["prompt"] for dataset in of_saved]
    train, test = load(f"{FILE}:rows")
    assert (train[0]["prompt"], test[0]["prompt"], test[0]["answer"]) == ("train 0", "test 0", "0")


def test_a_split_that_is_trained_on_is_not_evaluated_on(tmp_path):
    DatasetDict(train=Dataset.from_list(ROWS)).save_to_disk(str(tmp_path / "saved"))
    (tmp_path / "files").mkdir()
    write(tmp_path, "jsonl").rename(tmp_path / "files" / "train.jsonl")
    for folder, settings in (("saved", {}), ("saved", {"dataset_test_split": "train"}), ("files", {})):
        train, test = load(tmp_path / folder, **settings, **COLUMNS)
        assert {*train["prompt"]}.isdisjoint(test["prompt"]) and len(test) and len(train) + len(test) == 60


@pytest.mark.parametrize(
    ("template", "prompt"),
    [
        ("none", ROWS[0]["question"]),
        ("r1", format_prompt(ROWS[0]["question"])),
        ("chat", [{"role": "user", "content": ROWS[0]["question"]}]),
        (f"{FILE}:as_question", "Q: What is 0 + 1?\nA:"),
        (f"{FILE}:as_conversation", [{"role": "user", "content": ROWS[0]["question"]}]),
    ],
)
def test_what_makes_a_prompt(tmp_path, template, prompt):
    train, _ = load(write(tmp_path, "jsonl"), prompt_template=template, **COLUMNS)
    assert train[0]["prompt"] == prompt


def test_rows_are_filtered_and_prompts_may_be_conversations(tmp_path):
    easy, _ = load(write(tmp_path, "jsonl"), dataset_filter=f"{FILE}:is_easy", **COLUMNS)
    assert {*easy["level"]} == {1}
    talks = [{"prompt": [{"role": "user", "content": f"Say {number}"}]} for number in range(60)]
    (tmp_path / "talks.jsonl").write_text("\n".join(map(json.dumps, talks)))
    train, _ = load(tmp_path / "talks.jsonl")
    assert train[0]["prompt"] == talks[0]["prompt"] and "answer" not in train.column_names


def test_only_so_many_are_taken(tmp_path):
    train, test = load(write(tmp_path, "jsonl"), num_train_problems=7, num_eval_problems=2, **COLUMNS)
    assert (len(train), len(test)) == (7, 2)


MISTAKES = {
    "columns": (
        {},
        "prompt_column: {file} has no column 'prompt'; its columns are question, solution, level. The first",
    ),
    "answers": ({"prompt_column": "question", "answer_column": "key"}, "answer_column: {file} has no column 'key'"),
    "template": (
        COLUMNS | {"prompt_template": "r2"},
        "prompt_template: there is no 'r2'; use none, r1, chat, package.module:function",
    ),
    "prompt": (COLUMNS | {"prompt_column": "level"}, "a prompt must be a text or a list of messages"),
    "empty": (COLUMNS | {"prompt_template": f"{FILE}:of_nothing"}, "a prompt must be a text or a list of messages"),
    "filter": (COLUMNS | {"dataset_filter": f"{FILE}:as_nothing"}, "dataset_filter: "),
    "filtered": (COLUMNS | {"dataset_filter": f"{FILE}:of_nothing"}, "{file} has no rows after dataset_filter."),
    "raising": (COLUMNS | {"prompt_template": f"{FILE}:number"}, "'float' object is not callable"),
}


@pytest.mark.parametrize("settings, said", MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_in_columns_and_functions_is_one_line(tmp_path, settings, said):
    file = write(tmp_path, "jsonl")
    with pytest.raises(ValueError, match=r".") as refused:
        load(file, **settings)
    assert said.format(file=file) in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("rows.jsonl", '{"prompt": "a"}\n{"prompt": \n', "rows.jsonl, line 2: not JSON"),
        ("rows.jsonl", "[1, 2]\n", "row 1: an object is needed, and this is [1, 2]"),
        ("rows.jsonl", "\n", "rows.jsonl has no rows"),
        ("rows.json", "{}", "must hold a list of objects"),
        ("rows.txt", "a", "rows.txt ends in none of .jsonl, .json"),
        ("rows.parquet", "a", "rows.parquet cannot be read"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path, name, text, said):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match="dataset_name") as refused:
        load(tmp_path / name)
    assert said in str(refused.value) and "\n" not in str(refused.value)


def test_what_is_not_there_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no file or folder"):
        load(tmp_path / "rows.jsonl")
    with pytest.raises(ValueError, match="has no split 'train', it has none"):
        load(tmp_path)
    with pytest.raises(ValueError, match="returned 3; a datasets"):
        load(f"{FILE}:no_rows")
    DatasetDict(validation=Dataset.from_list(ROWS)).save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(ValueError, match="has no split 'train', it has validation"):
        load(tmp_path / "saved")


def test_a_name_is_looked_up_on_the_hub_only_if_it_can_be_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    on_hub = ("owner/name", "name", "hf://datasets/owner/name")
    assert all(map(is_on_the_hub, on_hub))
    assert not any(map(is_on_the_hub, ("here", "rows.jsonl", "./rows", "a/b/c", "mine.py:rows")))
