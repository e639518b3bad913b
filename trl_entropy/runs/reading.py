"""Reading a run's files, which may be cut, empty or damaged: the error names the file. Imports no torch."""

from __future__ import annotations

import csv
import io
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from trl_entropy.runs.strict_json import Row, from_line

_MOST_CHARACTERS = 160


class UnreadableFile(ValueError):
    """A file of a run that is not there, empty, cut or damaged; the message is one sentence that names it."""


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """
    Inside, whatever goes wrong is the fault of the file `path`.

    Raises:
        UnreadableFile: in place of every other exception.
    """
    try:
        yield
    except UnreadableFile:
        raise
    except Exception as error:
        raise UnreadableFile(f"{path} {_state_of(path)} ({why(error)})") from error


def _state_of(path: Path) -> str:
    if not path.exists():
        return "is not there"
    return "cannot be read: it is cut or damaged" if path.stat().st_size else "is empty"


def why(error: BaseException) -> str:
    """What an exception says, in one line: all of it if it names a file, else at most 160 characters."""
    text = " ".join(str(error).split()).rstrip(".")
    if isinstance(error, UnreadableFile):
        return text
    return textwrap.shorten(f"{type(error).__name__}: {text}", _MOST_CHARACTERS, placeholder=" ...").rstrip(": ")


def read_json_lines(path: Path, key: str = "step") -> tuple[list[Row], list[int]]:
    """The rows of a file such as `metrics.jsonl` that can be read, whose entry `key` is the number of a step, and the
    numbers of the lines that cannot, from 1."""
    rows, unreadable = [], []
    with open(path, encoding="utf-8", errors="replace", newline="\n") as file:  # line by line: a run may have 200 MB
        for number, line in enumerate(file, start=1):
            try:
                row = from_line(line)
                row[key] = int(row[key])
                rows.append(row)
            except (ValueError, KeyError, TypeError, AttributeError):
                if line.strip():
                    unreadable.append(number)
    return rows, unreadable


def read_csv_lines(path: Path) -> tuple[list[Row], list[int]]:
    """The rows of a CSV file with a column `step`, numbers parsed, and the numbers of the lines that are cut."""
    text = path.read_text(encoding="utf-8", errors="replace")
    reader = csv.DictReader(io.StringIO(text, newline=""))
    rows: dict[int, Row] = {}
    unreadable = []
    for row in reader:
        if None in row or None in row.values() or not _is_step(row.get("step")):
            unreadable.append(reader.line_num)
        else:
            rows[reader.line_num] = {name: _number(value) for name, value in row.items() if value != ""}
    last = max(reader.line_num, 1)
    if not text.endswith("\n") and last not in unreadable:  # an empty file, or a number that may go on
        rows.pop(last, None)
        unreadable.append(last)
    return list(rows.values()), unreadable


def check_last_line(path: Path) -> None:
    """Raises `ValueError` if a text file does not end with the end of a line, so that its last number may go on."""
    if not path.read_bytes().endswith(b"\n"):
        raise ValueError("its last line has no end")


def _is_step(text: str | None) -> bool:
    return isinstance(text, str) and text.isdigit()


def _number(text: str) -> float | str:
    """`text` as an int, else as a float, else as it is."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
