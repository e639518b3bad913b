"""
Functions of completions that the settings name: rewards, which make the advantages, and metrics, which only tell.

Both have TRL's signature for reward functions.
"""

from __future__ import annotations

import asyncio
import inspect
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from trl_entropy.tasks import lead_words, rewards, script
from trl_entropy.tasks.named import Named, described, files_of, named, with_settings
from trl_entropy.tasks.registry import task_of
from trl_entropy.tasks.user_code import line_of_function, naming_what_fails, parts_of_episodes

if TYPE_CHECKING:
    from trl_entropy.tasks.arguments import TaskArguments

Row = Mapping[str, Any]


def _of_trl(name: str) -> Callable[[], Any]:
    def load() -> Any:
        import trl.rewards

        return getattr(trl.rewards, name)

    return load


# What can be named without a file or a module. TRL's that are made by a function take `reward_kwargs`.
SHIPPED: dict[str, Callable[[], Any]] = {
    "tag_pref": lambda: rewards.tag_pref,
    "tag_math_correct": lambda: rewards.tag_math_correct,
    "format_reward": lambda: rewards.format_reward,
    "explore_reward": lambda: lead_words.explore_reward,
    "trap_reward": lambda: lead_words.trap_reward,
    **{
        name: _of_trl(name)
        for name in (
            "accuracy_reward",
            "reasoning_accuracy_reward",
            "think_format_reward",
            "get_cosine_scaled_reward",
            "get_repetition_penalty_reward",
            "get_soft_overlong_punishment",
        )
    },
}


class CompletionFunction(NamedTuple):
    """
    One reward function or metric function of a run.

    Attributes:
        name: as in the settings, a file by its absolute path.
        short: its own name, by which metrics and tables know it.
        function: with TRL's signature, the keyword settings applied; for a reward model its name.
        named: what was imported for it; None for a reward model and for a function that a script has handed over.
        kind: `"reward"` or `"metric"`, for messages.
    """

    name: str
    short: str
    function: Callable[..., Any] | str
    named: Named | None
    kind: str = "reward"

    @property
    def is_model(self) -> bool:
        return isinstance(self.function, str)

    def __call__(
        self, rows: Sequence[Row], completions: Sequence[Any], completion_ids: Sequence[Any], **more: Any
    ) -> list[float]:
        """
        The values of completions, nan where the function gives None.

        Args:
            rows: the dataset's row of each completion.
            more: what else TRL gives to reward functions: `trainer_state`, `environments`.

        Raises:
            ValueError: naming the function, where it can be told the line, and the first completion on which it fails
                when it is called with that one alone; also for what is no list of numbers.
        """
        columns = {name: [row[name] for row in rows] for name in (rows[0] if rows else {}) if name != "prompt"}
        quiet: dict[str, Any] = {
            "log_metric": _log_nothing,
            "log_extra": _log_nothing,
            "trainer_state": None,
            "environments": None,
        }
        keywords = {
            "prompts": [row["prompt"] for row in rows],
            "completions": list(completions),
            "completion_ids": list(completion_ids),
            **{**columns, **quiet, **more},
        }
        try:
            given = self._given(keywords)
        except (Exception, SystemExit) as error:
            raise self._failure(error, keywords) from error
        return self._numbers(given, completions)

    def checked(self) -> Callable[..., Any]:
        """
        The function for TRL, which it calls by keywords: what it raises, and what is no list of numbers, becomes a
        `ValueError` of one line, as when this is called.
        """
        assert callable(self.function), "TRL runs a reward model itself"

        def called(**keywords: Any) -> Any:
            try:
                given = self.function(**keywords)  # type: ignore[operator]
            except (Exception, SystemExit) as error:
                raise self._failure(error, keywords) from error
            return self._numbers(given, keywords["completions"])

        async def awaited(**keywords: Any) -> Any:
            try:
                given = await self.function(**keywords)  # type: ignore[operator]
            except (Exception, SystemExit) as error:
                for completion, one in _one_by_one(keywords):
                    try:
                        await self.function(**one)  # type: ignore[operator]
                    except (Exception, SystemExit):
                        raise self._named(error, completion) from error
                raise self._named(error) from error
            return self._numbers(given, keywords["completions"])

        from trl.trainer.utils import is_async_callable

        return awaited if is_async_callable(self.function) else called

    def _given(self, keywords: Mapping[str, Any]) -> Any:
        """What the function returns; it is awaited."""
        assert callable(self.function), "a reward model is called by the trainer alone"
        given = self.function(**keywords)
        if inspect.iscoroutine(given):
            with ThreadPoolExecutor(1) as other:  # a notebook's own thread has a loop already
                return other.submit(asyncio.run, given).result()
        return given

    def _failure(self, error: BaseException, keywords: Mapping[str, Any]) -> ValueError:
        """What is said of an exception, with the first completion on which the function fails alone."""
        if isinstance(error, TypeError) and "argument" in str(error):  # of its signature, not of a completion
            return ValueError(f"{self._named(error)}. It is given {', '.join(sorted(keywords))}")
        for completion, one in _one_by_one(keywords):
            try:
                self._given(one)
            except (Exception, SystemExit):
                return self._named(error, completion)
        return self._named(error)

    def _named(self, error: BaseException, *completion: Any) -> ValueError:
        where = line_of_function(error, self.function, self.name)
        which = "".join(f", for the completion {one!r:.200}" for one in completion)
        return ValueError(f"{self.kind} function {self.short}, {where}: {described(error)}{which}")

    def _numbers(self, given: object, completions: Sequence[Any]) -> list[float]:
        values = list(given) if isinstance(given, Iterable) and not isinstance(given, str | Mapping) else None
        if values is None or len(values) != len(completions):
            found = f"{given!r:.80}" if values is None else f"{len(values)} of them"
            raise ValueError(
                f"{self.kind} function {self.short} must return a list of {len(completions)} numbers, one a "
                f"completion; it returned {found}"
            )
        return [self._number(value, completion) for value, completion in zip(values, completions, strict=True)]

    def _number(self, value: Any, completion: Any) -> float:
        try:
            return math.nan if value is None else float(value)
        except (TypeError, ValueError):
            raise ValueError(
                f"{self.kind} function {self.short} must return numbers; it returned {value!r:.80} for the completion "
                f"{completion!r:.200}"
            ) from None


def _log_nothing(*args: object) -> None:
    """TRL's `log_metric` and `log_extra`, where nothing is logged."""


def _one_by_one(keywords: Mapping[str, Any]) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Each completion, and the keywords of a call with that one alone."""
    number = len(keywords["completions"])
    quiet = dict.fromkeys(("log_metric", "log_extra"), _log_nothing)
    for place, completion in enumerate(keywords["completions"]):
        one = {
            name: [column[place]] if isinstance(column, list) and len(column) == number else column
            for name, column in keywords.items()
        }
        yield completion, one | quiet


def reward_functions(task: TaskArguments) -> list[CompletionFunction]:
    """
    The run's reward functions; files and modules that the settings name are imported.

    Raises:
        ValueError: in one line, for a name, a file or a keyword setting that does not fit.
    """
    if task.task == script.SCRIPT:
        return _of_script("reward", script.parts_of(str(task.dataset_name)).reward_funcs)
    if not task.reward_funcs and not task.environment_factory:
        raise ValueError(f"reward_funcs is empty; name a function, such as {', '.join(SHIPPED)}.")
    return _functions("reward", task.reward_funcs, task.reward_kwargs)


def metric_functions(task: TaskArguments) -> list[CompletionFunction]:
    """The run's metric functions, as [`reward_functions`]."""
    if task.task == script.SCRIPT:
        return _of_script("metric", script.parts_of(str(task.dataset_name)).metric_funcs)
    return _functions("metric", task.metric_funcs, task.metric_kwargs)


def check_functions(task: TaskArguments) -> None:
    """
    Import the run's functions, and check that each has a name of its own and that `pass_reward` is one of them.

    Raises:
        ValueError: as [`reward_functions`], and where one is not so.
    """
    rewards_of_run, metrics = reward_functions(task), metric_functions(task)
    if both := {one.short for one in rewards_of_run} & {one.short for one in metrics}:
        raise ValueError(
            f"metric_funcs: {', '.join(sorted(both))} is a reward function too, and the tables of completions have a "
            "column for each; rewards are evaluated without being named here"
        )
    if task.pass_reward is not None:
        passing(task, evaluated_functions(task))


def evaluated_functions(task: TaskArguments) -> list[CompletionFunction]:
    """
    The reward functions, and after them the rewards that environments give by TRL's `get_reward`, by their class's
    name; for these one environment of each kind is made, as TRL does.

    Raises:
        ValueError: as [`reward_functions`], and when an environment cannot be made.
    """
    found = reward_functions(task)
    if task.task == script.SCRIPT:  # whose trainer has them among its own
        return found
    episodes = task_of(task).episodes(task)
    with naming_what_fails(lambda: parts_of_episodes([], episodes.factories)):
        kinds = {type(make()) for make in episodes.factories}
    return found + [_reward_of(kind) for kind in kinds if hasattr(kind, "get_reward")]


def _reward_of(kind: Any) -> CompletionFunction:
    """What an environment says of its own episode, as TRL 1.16 asks it."""

    async def awaited(environments: Sequence[Any], **kwargs: Any) -> list[Any]:
        return [await one.get_reward() if type(one) is kind else None for one in environments]

    def given(environments: Sequence[Any], **kwargs: Any) -> list[Any]:
        return [one.get_reward() if type(one) is kind else None for one in environments]

    is_async = inspect.iscoroutinefunction(kind.get_reward)
    return CompletionFunction(kind.__name__, kind.__name__, awaited if is_async else given, None)


def _of_script(kind: str, functions: Mapping[str, Callable[..., Any] | str]) -> list[CompletionFunction]:
    return [CompletionFunction(name, name, function, None, kind) for name, function in functions.items()]


def _functions(kind: str, names: Sequence[str], given: object) -> list[CompletionFunction]:
    kwargs: dict[str, Any] = dict(given or {})  # type: ignore[call-overload]
    found = [_function(kind, name, kwargs) for name in names]
    known = [name for one in found for name in (one.name, one.short)]
    if unknown := [name for name in kwargs if name not in known]:
        shorts = ", ".join(one.short for one in found) or "none"
        raise ValueError(f"{kind}_kwargs: {unknown[0]!r} is none of {kind}_funcs, which are {shorts}.")
    if twice := [one.short for one in found if [other.short for other in found].count(one.short) > 1]:
        raise ValueError(f"{kind}_funcs: {twice[0]!r} is the name of two functions, and numbers go by the name.")
    return found


def _function(kind: str, name: str, kwargs: Mapping[str, Any]) -> CompletionFunction:
    if kind == "reward" and is_reward_model(name):
        return CompletionFunction(name, Path(name).name, name, None)
    one = named(f"{kind}_funcs", name, SHIPPED)
    given = kwargs.get(name, kwargs.get(one.short, {}))
    if not isinstance(given, Mapping):
        raise ValueError(f"{kind}_kwargs: {one.short} has {given!r:.80}; names of settings with values are needed.")
    function = with_settings(f"{kind}_kwargs" if given else f"{kind}_funcs", one, given, "completions")
    return CompletionFunction(one.name, one.short, function, one, kind)


def is_reward_model(name: str) -> bool:
    """Whether the name is that of a model: a folder with one, or OWNER/NAME on the hub."""
    return (Path(name) / "config.json").is_file() or ("/" in name and ":" not in name and not name.endswith(".py"))


def passing(task: TaskArguments, found: Sequence[CompletionFunction]) -> CompletionFunction:
    """
    The function that says whether a completion passes.

    Raises:
        ValueError: when there is none, or it is a reward model.
    """
    functions = [one for one in found if not one.is_model]
    if task.pass_reward is not None:
        functions = [one for one in functions if task.pass_reward in (one.name, one.short)]
    chosen = next((one for one in functions if one.short != "format_reward"), functions[0] if functions else None)
    if chosen is None:
        wanted = "is not set" if task.pass_reward is None else f"is {task.pass_reward!r}"
        raise ValueError(
            f"pass_reward {wanted}, and names none of the functions {', '.join(one.short for one in found)}; an "
            "evaluation needs one, which is no reward model, to say whether a completion passes"
        )
    return chosen


def planned_functions(task: TaskArguments) -> dict[str, object]:
    """The settings of the resume contract that say which functions a run has."""
    rewards_of_run = [one.short for one in reward_functions(task)]
    return {"reward_funcs": rewards_of_run, "function_files": by_file_name(training_files(task))}


def training_files(task: TaskArguments) -> dict[str, str]:
    """The user's own files that change training, with their hashes: not those of metrics alone."""
    return files_of(name for name, setting in task.own_functions().items() if setting != "metric_funcs")


def by_file_name(files: Mapping[str, str]) -> dict[str, str]:
    """Without the folders, so that files may be moved."""
    return {Path(file).name: digest for file, digest in files.items()}


def import_functions(run: Path, task: TaskArguments, before: Mapping[str, str], may_import: bool) -> str | None:
    """
    Import the functions of the user's own that a run was trained with, if that was asked for.

    Args:
        before: their files when the run began, with their hashes: `function_files` of its `config.yaml`.

    Returns:
        What has changed in their files since; None if nothing has.

    Raises:
        ValueError: when there are some and it was not asked for, or they cannot be imported.
    """
    own = task.own_functions()
    if own and not may_import:
        raise ValueError(
            f"{run} was trained with functions of one's own: {', '.join(own)}. They must be imported, which runs "
            "these files: add --import_functions if you trust them"
        )
    for name, setting in own.items():
        script.parts_of(name) if task.task == script.SCRIPT else named(setting, name, {})
    changed = [file for file, digest in files_of(own).items() if before.get(file, digest) != digest]
    return f"{', '.join(changed)} is not what it was when the run began" if changed else None


class Trial(NamedTuple):
    """What a function gave for completions that were made up, and seconds per completion."""

    function: CompletionFunction
    values: list[float]
    seconds: float


def tried(found: Sequence[CompletionFunction], rows: Sequence[Row]) -> list[Trial]:
    """
    Call each function on made-up completions of these rows: nothing, a sentence, and the right answer in its tags.

    Raises:
        ValueError: what a function raises, in one line, or that what it returns is no list of numbers.
    """
    texts = [_made_up(place, row) for place, row in enumerate(rows)]
    completions = [
        text if isinstance(row["prompt"], str) else [{"role": "assistant", "content": text}]
        for text, row in zip(texts, rows, strict=True)
    ]
    trials = []
    for one in found:
        if not one.is_model:
            start = time.perf_counter()
            values = one(rows, completions, [[0] * len(text.split()) for text in texts])
            trials.append(Trial(one, values, (time.perf_counter() - start) / max(1, len(rows))))
    return trials


def _made_up(place: int, row: Row) -> str:
    answer = row.get("answer", 42)
    return ("", "I do not know.", f"It is so. </think> <answer>{answer}</answer>")[place % 3]
