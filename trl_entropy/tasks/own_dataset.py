"""The user's own problems: a file, a folder, a dataset of the hub, or a function, with the columns that they have."""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trl_entropy.tasks.named import DATA_FILES, Named, described, is_of_user, line_of, named
from trl_entropy.tasks.prompts import Prompt, check_conversations, prompt_id, short_enough
from trl_entropy.tasks.r1_template import format_prompt

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict
    from transformers import PreTrainedTokenizerBase

    from trl_entropy.tasks.arguments import TaskArguments

logger = logging.getLogger(__name__)

HUB_PREFIX = "hf://datasets/"
# What a file is read with, by how its name ends.
_READERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}
_HELD_OUT_SHARE = 10  # one in so many prompts is held out of a dataset without a test split

Row = dict[str, Any]


def load_own_dataset(task: TaskArguments, split: str, tokenizer: PreTrainedTokenizerBase | None) -> Dataset:
    """
    The user's problems, with the columns `prompt`, `answer` where there is one, `prompt_id`, and all others.

    Without a split for evaluation one prompt in ten is held out, chosen by a hash of the prompt, so that the same
    prompt never stands on both sides.

    Args:
        split: `"train"` or `"test"`; [`TaskArguments`] has their names in the dataset.
        tokenizer: has the chat template of conversations, and counts the tokens of prompts, if there is a
            `max_prompt_length`; None: none is dropped.

    Raises:
        OSError: when a file or a dataset of the hub cannot be read.
        ValueError: for a column, a split or a function that is not there, or a prompt that cannot be used; the
            message shows the first row.
    """
    name = task.dataset_train_split if split == "train" else task.dataset_test_split
    dataset, has_test = _read(task, name)
    dataset = _prepared(_filtered(dataset, task), task)
    if not has_test:
        held_out = [_is_held_out(name) for name in dataset["prompt_id"]]
        dataset = dataset.select([row for row, is_out in enumerate(held_out) if is_out == (split == "test")])
        _say_held_out(str(task.dataset_name), task.dataset_test_split)
    if not len(dataset):
        raise ValueError(
            f"{task.dataset_name}: no row is left for {'training' if split == 'train' else 'evaluation'}."
        )
    if tokenizer is not None:
        check_conversations(dataset["prompt"], tokenizer)
    return short_enough(dataset, task.max_prompt_length, tokenizer)


@functools.cache
def _say_held_out(name: str, split: str) -> None:
    logger.info("%s has no split %r: every tenth prompt is held out", name, split)


def is_on_the_hub(name: str) -> bool:
    """Whether a dataset of this name is looked up on the hub: no file or folder here has it, and it is no function."""
    return not Path(name).expanduser().exists() and (name.startswith(HUB_PREFIX) or _looks_like_hub(name))


def _looks_like_hub(name: str) -> bool:
    is_file = Path(name).suffix.lower() in DATA_FILES
    return name.count("/") <= 1 and not is_file and not is_of_user(name) and not name.startswith((".", "~", "/"))


# ---- reading


def _read(task: TaskArguments, split: str) -> tuple[Dataset, bool]:
    """The rows of a split, and whether there is one for evaluation; if not, all rows of the one for training."""
    name, path = str(task.dataset_name), Path(str(task.dataset_name)).expanduser()
    if is_of_user(name) and not path.exists():
        return _from_function(task, split)
    if path.is_file():
        return _file(path), False
    if path.is_dir():
        return _folder(path, split, task)
    if is_on_the_hub(name):
        return _of_dataset(_hub(name.removeprefix(HUB_PREFIX), task), split, task)
    raise FileNotFoundError(
        f"dataset_name: there is no file or folder {path} (seen from {Path.cwd()}); name a file (JSONL, JSON, CSV, "
        "Parquet), a folder, a dataset of the hub (OWNER/NAME), or path/to/file.py:function"
    )


def _file(path: Path) -> Dataset:
    from datasets import Dataset

    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise ValueError(f"dataset_name: {path} ends in none of {', '.join(_READERS)}.")
    if reader == "json":
        return _of_rows(_json_rows(path), str(path))
    import pandas as pd

    try:
        if reader == "parquet":
            return Dataset.from_parquet(str(path), keep_in_memory=True)
        table = pd.read_csv(path, sep="\t" if path.suffix.lower() == ".tsv" else ",", dtype=str, keep_default_na=False)
        return Dataset.from_pandas(table, preserve_index=False)
    except OSError:
        raise
    except Exception as error:  # pyarrow and pandas have errors of their own
        raise ValueError(f"dataset_name: {path} cannot be read: {described(error)}.") from error


def _of_rows(rows: list[Row], where: str) -> Dataset:
    from datasets import Dataset

    try:
        return Dataset.from_list(rows)
    except Exception as error:  # of pyarrow
        kinds = {name: {type(row.get(name)).__name__ for row in rows} - {"NoneType"} for name in rows[0]}
        mixed = next((name for name, found in kinds.items() if len(found) > 1), None)
        which = "" if mixed is None else f" Column {mixed!r} has {' and '.join(sorted(kinds[mixed]))}."
        raise ValueError(
            f"dataset_name: {where}: each column must have values of one kind ({described(error)}).{which}"
        ) from error


def _json_rows(path: Path) -> list[Row]:
    """The objects of a JSON lines file, or of the list that a JSON file holds."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"dataset_name: {path} is not UTF-8 ({error.reason}); save it as UTF-8.") from error
    if path.suffix.lower() == ".json":
        found = _json(text, str(path))
        if not isinstance(found, list):
            raise ValueError(f"dataset_name: {path} must hold a list of objects, [{{...}}, {{...}}].")
        rows = list(enumerate(found, start=1))
    else:
        lines = enumerate(text.splitlines(), start=1)
        rows = [(number, _json(line, f"{path}, line {number}")) for number, line in lines if line.strip()]
    for number, row in rows:
        if not isinstance(row, dict):
            raise ValueError(f"dataset_name: {path}, row {number}: an object is needed, and this is {row!r:.80}.")
    if not rows:
        raise ValueError(f"dataset_name: {path} has no rows.")
    names = dict.fromkeys(name for _, row in rows for name in row)
    return [{name: row.get(name) for name in names} for _, row in rows]


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"dataset_name: {where}: not JSON ({described(error)}).") from error


def _folder(path: Path, split: str, task: TaskArguments) -> tuple[Dataset, bool]:
    """A folder with a file for each split, or one that `save_to_disk` has written."""
    from datasets import load_from_disk

    if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        return _of_dataset(load_from_disk(str(path)), split, task)
    files = [file for file in sorted(path.iterdir()) if file.suffix.lower() in _READERS]
    return _chosen({file.stem: functools.partial(_file, file) for file in files}, split, task)


def _hub(name: str, task: TaskArguments) -> Dataset | DatasetDict:
    from datasets import load_dataset

    try:
        return load_dataset(name, task.dataset_config)
    except OSError:
        raise
    except Exception as error:
        raise ValueError(f"dataset_name: {name} cannot be read from the hub: {described(error)}.") from error


def _of_dataset(found: Dataset | DatasetDict, split: str, task: TaskArguments) -> tuple[Dataset, bool]:
    from datasets import DatasetDict

    if not isinstance(found, DatasetDict):
        return found, False
    return _chosen({name: functools.partial(found.__getitem__, name) for name in found}, split, task)


def _chosen(splits: Mapping[str, Callable[[], Dataset]], split: str, task: TaskArguments) -> tuple[Dataset, bool]:
    """The rows of `split`, and whether there is one for evaluation; if not, all rows of the one for training."""
    has_test = task.dataset_test_split in splits and task.dataset_test_split != task.dataset_train_split
    name = split if has_test else task.dataset_train_split
    if name not in splits:
        raise ValueError(
            f"dataset_name: {task.dataset_name} has no split {name!r}, it has {', '.join(splits) or 'none'}. Name the "
            "splits with dataset_train_split and dataset_test_split."
        )
    return splits[name](), has_test


def _from_function(task: TaskArguments, split: str) -> tuple[Dataset, bool]:
    """What `function(split)` returns: a `Dataset`, or a list of rows."""
    from datasets import Dataset

    one = named("dataset_name", str(task.dataset_name), {})
    found = _called("dataset_name", one, split)
    if isinstance(found, list) and found and all(isinstance(row, dict) for row in found):
        found = _of_rows(found, one.name)
    if not isinstance(found, Dataset):
        raise ValueError(
            f"dataset_name: {one.name}({split!r}) returned {found!r:.80}; a datasets.Dataset or a list of dicts is "
            "needed."
        )
    return found, True


# ---- columns and prompts


def _filtered(dataset: Dataset, task: TaskArguments) -> Dataset:
    if not task.dataset_filter:
        return dataset
    one = named("dataset_filter", task.dataset_filter, {})
    return dataset.select([place for place, row in enumerate(dataset) if _called("dataset_filter", one, row)])


def _prepared(dataset: Dataset, task: TaskArguments) -> Dataset:
    """With the columns of this package's tasks."""
    from datasets import Dataset

    _check_columns(dataset, task)
    template = _template(task.prompt_template)
    rows = list(dataset)
    prompts = [_checked(template(row | {"prompt": row.get(task.prompt_column)}), row, task) for row in rows]
    if len({type(prompt) for prompt in prompts}) > 1:
        text, talk = (next(one for one in prompts if isinstance(one, kind)) for kind in (str, list))
        raise ValueError(
            f"prompt_column: some prompts are texts, such as {text!r:.80}, and some conversations, such as "
            f"{talk!r:.80}; prompt_template: chat makes conversations of all."
        )
    kept = [name for name in dataset.column_names if name not in (task.prompt_column, "prompt", "prompt_id")]
    columns = {"prompt": prompts, "prompt_id": [prompt_id("dataset", prompt) for prompt in prompts]}
    if task.answer_column in dataset.column_names:
        columns["answer"] = dataset[task.answer_column]
        kept = [name for name in kept if name not in (task.answer_column, "answer")]
    return Dataset.from_dict(columns | {name: dataset[name] for name in kept})


def _check_columns(dataset: Dataset, task: TaskArguments) -> None:
    if not len(dataset):
        where = " after dataset_filter" if task.dataset_filter else ""
        raise ValueError(f"dataset_name: {task.dataset_name} has no rows{where}.")
    makes_prompts = task.prompt_template not in _TEMPLATES
    for setting, column in (("prompt_column", task.prompt_column), ("answer_column", task.answer_column)):
        is_needed = (setting == "prompt_column" and not makes_prompts) or column not in ("prompt", "answer")
        if is_needed and column not in dataset.column_names:
            raise ValueError(
                f"{setting}: {task.dataset_name} has no column {column!r}; its columns are "
                f"{', '.join(dataset.column_names)}. The first row is {_shown(dataset[0])}."
            )


def _shown(row: Row) -> str:
    return f"{json.dumps(row, ensure_ascii=False, default=str):.300}"


def _none(row: Row) -> Any:
    return row["prompt"]


def _r1(row: Row) -> Any:
    return format_prompt(row["prompt"]) if isinstance(row["prompt"], str) else None


def _chat(row: Row) -> Any:
    prompt = row["prompt"]
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


_TEMPLATES: Mapping[str, Callable[..., Any]] = {"none": _none, "r1": _r1, "chat": _chat}


def _template(name: str) -> Callable[[Row], Any]:
    if name in _TEMPLATES:
        return _TEMPLATES[name]
    one = named("prompt_template", name, dict(_TEMPLATES))
    return lambda row: _called("prompt_template", one, row)


def _called(setting: str, one: Named, given: object) -> Any:
    try:
        return one.value(given)
    except Exception as error:
        what = f"{given!r:.200}"
        raise ValueError(f"{setting}: {line_of(error, one)}: {described(error)}, for {what}.") from error


def _checked(prompt: object, row: Row, task: TaskArguments) -> Prompt:
    if isinstance(prompt, str) and prompt:
        return prompt
    is_message = lambda one: isinstance(one, dict) and "role" in one and "content" in one  # noqa: E731
    if isinstance(prompt, list) and prompt and all(map(is_message, prompt)):
        return prompt
    raise ValueError(
        f"prompt_column: a prompt must be a text or a list of messages with role and content"
        f"{', of which prompt_template r1 takes a text' if task.prompt_template == 'r1' else ''}; this one is "
        f"{prompt if prompt is not None else row.get(task.prompt_column)!r:.120}, of the row {_shown(row)}."
    )


def _is_held_out(prompt_id: str) -> bool:
    return int(prompt_id.rpartition("/")[2], 16) % _HELD_OUT_SHARE == 0
