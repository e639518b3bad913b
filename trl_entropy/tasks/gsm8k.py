"""GSM8K (Cobbe et al. 2021, arXiv 2110.14168) in the R1 template, from local JSON lines or from the hub."""

import hashlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from trl_entropy.tasks.prompts import short_enough
from trl_entropy.tasks.r1_template import format_completion, format_prompt

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

HUB_CONFIG = "main"
ANSWER_MARK = "####"
_CALCULATOR_MARK = re.compile(r"<<[^<>]*>>")  # such as <<48/2=24>>
HUB_NAME = "openai/gsm8k"
HUB_PREFIX = "hf://datasets/"
# ASCII digits; commas, if there are any, before each group of three.
_NUMBER = re.compile(r"-?([0-9]+|[0-9]{1,3}(,[0-9]{3})+)(\.[0-9]+)?")


class GSM8KProblem(NamedTuple):
    """A parsed record: the question, the worked solution without calculator annotations, the answer without commas."""

    question: str
    solution: str
    answer: str

    @property
    def prompt_id(self) -> str:
        """An id that depends on the question alone: filters, the order of files and their source do not change it."""
        return f"gsm8k/{hashlib.sha256(self.question.encode()).hexdigest()[:16]}"


def load_gsm8k(
    path_or_name: str | os.PathLike = HUB_NAME,
    split: str = "train",
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    max_prompt_length: int | None = 200,
) -> "Dataset":
    """Loads GSM8K for RL.

    Args:
        path_or_name: A JSON lines file, a directory with `train.jsonl` and `test.jsonl`, or a dataset of the hub:
            `openai/gsm8k`, or another one as `hf://datasets/OWNER/NAME`; no other name is looked up there. Each record
            has a `question` and an `answer` that ends with `#### NUMBER`: digits 0 to 9, with or without commas
            between groups of three.
        split: `"train"` or `"test"`; ignored when a file is named.
        tokenizer: The tokenizer of the model; if it is given, prompts longer than `max_prompt_length` are dropped.
        max_prompt_length: In tokens, with the template; `None`: no limit.

    Returns:
        A dataset with the columns `prompt`, `answer` (a string such as `"-1080"`), `prompt_id` and `question`.

    Raises:
        FileNotFoundError: If `path_or_name` is neither a dataset of the hub nor a file or folder that is there.
        ValueError: If a record cannot be parsed (the message names file and line), or no record is found or left.
    """
    from datasets import Dataset

    problems = _read(path_or_name, split)
    rows = {
        "prompt": [format_prompt(problem.question) for problem in problems],
        "answer": [problem.answer for problem in problems],
        "prompt_id": [problem.prompt_id for problem in problems],
        "question": [problem.question for problem in problems],
    }
    return short_enough(Dataset.from_dict(rows), max_prompt_length, tokenizer)


def load_gsm8k_demonstrations(
    path_or_name: str | os.PathLike = HUB_NAME,
    split: str = "train",
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    max_prompt_length: int | None = 200,
) -> "Dataset":
    """Loads GSM8K for supervised training: the worked solutions in the template.

    Args:
        path_or_name: See [`load_gsm8k`].
        split: See [`load_gsm8k`].
        tokenizer: See [`load_gsm8k`].
        max_prompt_length: See [`load_gsm8k`].

    Returns:
        A dataset with the columns `prompt`, `completion` (without an end token) and `prompt_id`.

    Raises:
        FileNotFoundError: See [`load_gsm8k`].
        ValueError: See [`load_gsm8k`].
    """
    from datasets import Dataset

    problems = _read(path_or_name, split)
    rows = {
        "prompt": [format_prompt(problem.question) for problem in problems],
        "completion": [format_completion(problem.solution, problem.answer) for problem in problems],
        "prompt_id": [problem.prompt_id for problem in problems],
    }
    return short_enough(Dataset.from_dict(rows), max_prompt_length, tokenizer)


def local_path(path_or_name: str | os.PathLike, split: str) -> Path | None:
    """
    The file of a split; None for a dataset of the hub.

    Raises:
        FileNotFoundError: If there is no such file or folder.
    """
    path = Path(path_or_name).expanduser()
    if path.is_dir():
        path /= f"{split}.jsonl"
    if path.is_file():
        return path
    name = os.fspath(path_or_name)
    if name == HUB_NAME or name.startswith(HUB_PREFIX):
        return None
    raise FileNotFoundError(
        f"dataset_name: there is no file or folder {path} (seen from {Path.cwd()}); name a folder with train.jsonl "
        f"and test.jsonl, a JSON lines file, {HUB_NAME}, or another dataset of the hub as {HUB_PREFIX}OWNER/NAME"
    )


def _read(path_or_name: str | os.PathLike, split: str) -> list[GSM8KProblem]:
    path = local_path(path_or_name, split)
    name = os.fspath(path_or_name).removeprefix(HUB_PREFIX)
    problems = list(_read_hub(name, split) if path is None else _read_file(path))
    if not problems:
        raise ValueError(f"no records in {path or name}")
    return problems


def _read_file(path: Path) -> Iterator[GSM8KProblem]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                record = json.loads(line.decode("utf-8"))
            except UnicodeDecodeError as error:
                raise ValueError(f"{where}: not UTF-8 ({error.reason}); save the file as UTF-8") from error
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{where}: not JSON ({error})") from error
            yield _parse(record, where)


def _read_hub(name: str, split: str) -> Iterator[GSM8KProblem]:
    from datasets import load_dataset

    for number, record in enumerate(load_dataset(name, HUB_CONFIG, split=split), start=1):
        yield _parse(record, f"{name} {split}, record {number}")


def _parse(record: object, where: str) -> GSM8KProblem:
    question, worked = (record.get(key) if isinstance(record, dict) else None for key in ("question", "answer"))
    if not isinstance(question, str) or not isinstance(worked, str):
        raise ValueError(f"{where}: expected an object with the strings 'question' and 'answer', got {record!r:.200}")
    solution, mark, answer = worked.rpartition(ANSWER_MARK)
    answer = answer.strip()
    if not mark or not _NUMBER.fullmatch(answer):
        raise ValueError(
            f"{where}: the answer must end with '{ANSWER_MARK} NUMBER', in digits 0 to 9, with or without commas "
            f"between groups of three; got {worked[-60:]!r}"
        )
    return GSM8KProblem(question.strip(), _CALCULATOR_MARK.sub("", solution).strip(), answer.replace(",", ""))
