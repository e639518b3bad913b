import json
import logging
import re
from pathlib import Path

import pytest

from trl_entropy.models.embedded import build_tokenizer
from trl_entropy.tasks.gsm8k import load_gsm8k, load_gsm8k_demonstrations

REAL = Path(__file__).parents[3] / "shared" / "data" / "gsm8k"
SOLUTION = "A sells 48/2 = <<48/2=24>>24 and\nthen <<1000+24=1024>>1,024 clips.\n#### 1,024"
RECORDS = [
    {"question": "How many clips?", "answer": SOLUTION},
    {"question": "How cold is it? " + "Very cold. " * 20, "answer": "It falls.\n#### -7"},
    {"question": " A half? ", "answer": "1/2=<<1/2=.5>>0.5\n#### 0.5"},
]


@pytest.fixture
def directory(tmp_path):
    """A directory laid out as GSM8K is."""
    for split, records in {"train": RECORDS, "test": RECORDS[::-1][:2]}.items():
        (tmp_path / f"{split}.jsonl").write_text("\n".join(map(json.dumps, records)) + "\n\n")
    return tmp_path


@pytest.mark.parametrize("split, num_problems", [("train", 7473), ("test", 1319)])
def test_real_files(split, num_problems):
    if not REAL.is_dir():
        pytest.skip("the GSM8K files are not beside this checkout")
    dataset = load_gsm8k(REAL, split)
    assert len(dataset) == num_problems
    assert len(set(dataset["prompt_id"])) == num_problems
    assert all(re.fullmatch(r"-?\d+", answer) for answer in dataset["answer"])
    raw = [json.loads(line) for line in (REAL / f"{split}.jsonl").open(encoding="utf-8")]
    for row, record in zip(dataset, raw, strict=True):
        assert row["question"] in row["prompt"]
        assert row["answer"] == record["answer"].split()[-1].replace(",", "")


def test_real_demonstrations_carry_no_calculator_marks():
    if not REAL.is_dir():
        pytest.skip("the GSM8K files are not beside this checkout")
    dataset = load_gsm8k_demonstrations(REAL, "test")
    assert not any(mark in text for text in dataset["completion"] for mark in ("<<", ">>", "####"))


def test_columns_answers_and_ids(directory):
    dataset = load_gsm8k(directory, "train")
    assert dataset.column_names == ["prompt", "answer", "prompt_id", "question"]
    assert dataset["answer"][:] == ["1024", "-7", "0.5"]
    assert dataset["prompt"][0].endswith("\nQuestion: How many clips?\nResponse: <think>")
    by_file = load_gsm8k(str(directory / "train.jsonl"))
    assert by_file["prompt_id"][:] == dataset["prompt_id"][:]
    # The id follows the question, not its place.
    assert load_gsm8k(directory, "test")["prompt_id"][:] == dataset["prompt_id"][:][::-1][:2]


def test_the_answer_stands_after_the_last_mark(tmp_path):
    record = {"question": "How many?", "answer": "At first\n#### 5\nbut one more:\n#### 6"}
    (tmp_path / "train.jsonl").write_text(json.dumps(record))
    assert load_gsm8k(tmp_path)["answer"][:] == ["6"]


def test_demonstration(directory):
    row = load_gsm8k_demonstrations(directory)[0]
    expected = " A sells 48/2 = 24 and\nthen 1,024 clips. </think> <answer>1024</answer>"
    assert row["completion"] == expected
    assert row["prompt_id"] == load_gsm8k(directory)["prompt_id"][0]


def test_length_filter_says_how_many_it_dropped(directory, caplog):
    tokenizer = build_tokenizer()
    lengths = [len(ids) for ids in tokenizer(load_gsm8k(directory)["prompt"][:])["input_ids"]]
    limit = sorted(lengths)[1]
    with caplog.at_level(logging.WARNING, logger="trl_entropy.tasks.gsm8k"):
        dataset = load_gsm8k(directory, tokenizer=tokenizer, max_prompt_length=limit)
    assert dataset["question"][:] == ["How many clips?", "A half?"]
    assert f"dropped 1 of 3 prompts longer than {limit} tokens" in caplog.text
    assert len(load_gsm8k(directory, tokenizer=tokenizer, max_prompt_length=None)) == 3
    with pytest.raises(ValueError, match=r"no prompt of 3 fits into max_prompt_length=1 tokens"):
        load_gsm8k(directory, tokenizer=tokenizer, max_prompt_length=1)


BAD_LINES = [
    "{",
    "[1]",
    '{"question": "q"}',
    '{"question": 1, "answer": "#### 1"}',
    '{"question": "q", "answer": "#### x"}',
    '{"question": "q", "answer": "no mark 3"}',
    *(json.dumps({"question": "q", "answer": f"#### {one}"}) for one in ("1,5", "1,2,3", "1,024,5", ",5", "1,,000")),
    '{"question": "q", "answer": "#### \u0665"}',  # an Arabic-Indic five
    '{"question": "q", "answer": "caf\xe9 #### 5"}'.encode("latin-1"),
    "[" * 100_000,
]


@pytest.mark.parametrize("line", BAD_LINES, ids=lambda line: repr(line)[:40])
def test_a_bad_record_is_named_by_file_and_line(directory, line):
    path = directory / "train.jsonl"
    text = line.encode() if isinstance(line, str) else line
    path.write_bytes(json.dumps(RECORDS[0]).encode() + b"\n\n" + text + b"\n")
    with pytest.raises(ValueError, match=rf"{re.escape(str(path))}, line 3: ") as error:
        load_gsm8k(directory)
    assert "\n" not in str(error.value)


def test_missing_or_empty_files(directory):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_gsm8k("./nowhere")
    with pytest.raises(FileNotFoundError, match=r"validation\.jsonl"):
        load_gsm8k(directory, "validation")
    (directory / "train.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="no records"):
        load_gsm8k(directory)


@pytest.mark.parametrize("name", ["data/gsm8k", "gsm8k", "my_data", "openai/gsm8k/main"])
def test_a_folder_that_is_not_there_is_not_sought_on_the_hub(name, monkeypatch, tmp_path):
    import datasets

    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: pytest.fail("sought on the hub"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=f"no file or folder {name} .*hf://datasets/OWNER/NAME"):
        load_gsm8k(name)


def test_hub_dataset(monkeypatch):
    import datasets

    names = []

    def load_dataset(name, config, split):
        names.append(name)
        assert config == "main"
        return datasets.Dataset.from_list(RECORDS if split == "train" else [{"question": "q", "answer": "none"}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert load_gsm8k()["answer"][:] == ["1024", "-7", "0.5"]
    with pytest.raises(ValueError, match="openai/gsm8k test, record 1"):
        load_gsm8k(split="test")
    load_gsm8k("hf://datasets/someone/gsm8k-like")
    assert names == ["openai/gsm8k", "openai/gsm8k", "someone/gsm8k-like"]
