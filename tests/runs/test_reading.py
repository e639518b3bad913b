"""Files that are cut, empty or damaged: lines that are whole are read, and the file is named."""

import json

import pytest

from trl_entropy.runs.directory import RunDirectory
from trl_entropy.runs.reading import UnreadableFile, check_last_line, read_csv_lines, read_json_lines, reading, why


def test_the_error_names_the_file_and_its_state_in_one_line(tmp_path):
    for name, content, state in (("cut", '{"a": ', "cannot be read: it is cut or damaged"), ("none", "", "is empty")):
        path = tmp_path / name
        path.write_text(content)
        with pytest.raises(UnreadableFile) as error, reading(path):
            json.loads(path.read_text())
        assert str(error.value).startswith(f"{path} {state} (JSONDecodeError: ") and "\n" not in str(error.value)
    with pytest.raises(UnreadableFile, match="gone is not there"), reading(tmp_path / "gone"):
        (tmp_path / "gone").read_text()


def test_a_reason_is_one_short_line():
    assert why(ValueError("a\n  b.")) == "ValueError: a b" and why(KeyError()) == "KeyError"
    assert len(why(ValueError("word " * 100))) <= 160
    assert why(UnreadableFile("word " * 100)) == ("word " * 100).strip()


@pytest.mark.parametrize("line", ['{"step": 3, "re', "[1, 2]", "7", '{"reward": 1}', "\0" * 20, '{"step": null}',
                                  '{"step": 3, "not_finite": 5}'])  # fmt: skip
def test_lines_of_metrics_that_cannot_be_read_are_counted_and_the_others_are_read(tmp_path, line):
    run = RunDirectory(tmp_path)
    run.metrics_path.write_text('{"step": 1, "reward": 0.5}\n' + line + '\n{"step": 2, "reward": 0.25}\n')
    assert read_json_lines(run.metrics_path)[1] == [2]
    assert [row["step"] for row in run.metrics()] == [1, 2] and run.unreadable_lines == {run.metrics_path: [2]}


def test_a_row_of_csv_that_is_cut_anywhere_is_left_out(tmp_path):
    """Also where only digits are lost: a number that may go on is no number."""
    run = RunDirectory(tmp_path)
    for step, value in ((5, 0.125), (10, 0.875)):
        run.append_evaluation(step, {"reward": value, "entropy": 1.5})
    content = run.evaluation_path.read_bytes()
    start = content.index(b"10,")
    for length in range(start + 1, len(content) - 1):
        run.evaluation_path.write_bytes(content[:length])
        assert [row["step"] for row in run.evaluation()] == [5] and run.unreadable_lines[run.evaluation_path] == [3]
    run.evaluation_path.write_bytes(content)
    assert [row["step"] for row in run.evaluation()] == [5, 10] and run.unreadable_lines[run.evaluation_path] == []


@pytest.mark.parametrize("content", [b"", b"step,rew", b"\0\0\0\0"])
def test_a_csv_without_a_whole_line_has_no_rows_and_is_named(tmp_path, content):
    path = tmp_path / "metrics.csv"
    path.write_bytes(content)
    assert read_csv_lines(path) == ([], [1])


def test_a_table_whose_last_line_has_no_end(tmp_path):
    (tmp_path / "t.csv").write_text("a,b\n1,2\n1,0.1")
    with pytest.raises(ValueError, match="last line has no end"):
        check_last_line(tmp_path / "t.csv")
