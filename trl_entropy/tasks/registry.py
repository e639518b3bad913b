"""The tasks by name: where their problems come from, and what the commands must know of them."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from trl_entropy.tasks import calculator, gsm8k, lead_words, own_dataset, script, word_problems
from trl_entropy.tasks.arguments import TaskArguments
from trl_entropy.tasks.named import Named, described, named
from trl_entropy.tasks.prompts import check_conversations

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

# For prompts without a limit of their length; nothing counts their tokens before a tokenizer is loaded.
ASSUMED_PROMPT_LENGTH = 200


class Wanted(NamedTuple):
    """
    Which problems to load.

    Attributes:
        split: `"train"` or `"test"`.
        most: how many at most; None: all.
        tokenizer: None: prompts are not sorted out by their length.
        seed: which problems, where they are drawn.
    """

    split: str
    most: int | None
    tokenizer: PreTrainedTokenizerBase | None = None
    seed: int = 0


class Episodes(NamedTuple):
    """What makes a task's completions episodes: for TRL's `tools` and `environment_factory`."""

    tools: list[Callable[..., Any]]
    environment_factory: Callable[[], Any] | Mapping[Any, Callable[[], Any]] | None

    @property
    def factories(self) -> list[Callable[[], Any]]:
        """What makes environments, of each kind that there is."""
        made = self.environment_factory
        return [] if made is None else [*made.values()] if isinstance(made, Mapping) else [made]


class Task(ABC):
    """
    One task; its settings are in [`TaskArguments`].

    Attributes:
        most_by_default: training problems where `num_train_problems` is not set; None: all.
    """

    most_by_default: int | None = 4096

    @abstractmethod
    def load(self, args: TaskArguments, wanted: Wanted) -> Dataset:
        """
        Problems with the columns `prompt` and `prompt_id`, and `answer` if there are answers.

        Raises:
            OSError: when a file or a dataset of the hub cannot be read.
            ValueError: when a record cannot be parsed, or none is left.
        """

    def num_problems(self, args: TaskArguments) -> int:
        """The largest number of training problems, as far as it is known before they are read."""
        return args.num_train_problems or Task.most_by_default or 0

    def episodes(self, args: TaskArguments) -> Episodes:
        """What the policy may call; nothing for a task of single turns."""
        return Episodes([], None)

    def has_episodes(self, args: TaskArguments) -> bool:
        """Whether there is something to call; nothing is imported."""
        return False

    def longest_prompt(self, args: TaskArguments) -> int | None:
        """In tokens; None if it is not known."""
        return None

    def source(self, args: TaskArguments) -> str:
        """Where the problems come from, for messages."""
        return str(args.task)

    def hub_name(self, args: TaskArguments) -> str | None:
        """The dataset of the hub that is read; None for what is here."""
        return None

    def reads_files(self) -> bool:
        """Whether its problems are read, and may so be on another machine alone."""
        return False


def _first(dataset: Dataset, most: int | None) -> Dataset:
    return dataset if most is None else dataset.select(range(min(most, len(dataset))))


class WordProblems(Task):
    """The embedded arithmetic problems, made in code."""

    def load(self, args: TaskArguments, wanted: Wanted) -> Dataset:
        most = wanted.most or word_problems.MAX_PROBLEMS[wanted.split]
        return word_problems.load_word_problems(wanted.split, most, seed=wanted.seed)


class LeadWords(Task):
    """The word problems with two operations, for the rewards of `explore` and `trap`."""

    most_by_default = 2048

    def load(self, args: TaskArguments, wanted: Wanted) -> Dataset:
        return lead_words.load_two_step_problems(wanted.split, wanted.most, seed=wanted.seed)

    def num_problems(self, args: TaskArguments) -> int:
        return args.num_train_problems or self.most_by_default


class Calculator(Task):
    """The embedded problems of an agent with a tool, made in code."""

    def load(self, args: TaskArguments, wanted: Wanted) -> Dataset:
        most = wanted.most or calculator.MAX_PROBLEMS[wanted.split]
        return calculator.load_calculator_problems(wanted.split, most, seed=wanted.seed)

    def episodes(self, args: TaskArguments) -> Episodes:
        return Episodes([calculator.calculate], None)

    def has_episodes(self, args: TaskArguments) -> bool:
        return True


class GSM8K(Task):
    """GSM8K from the hub or from files."""

    def load(self, args: TaskArguments, wanted: Wanted) -> Dataset:
        longest = self.longest_prompt(args)
        return _first(gsm8k.load_gsm8k(self.source(args), wanted.split, wanted.tokenizer, longest), wanted.most)

    def longest_prompt(self, args: TaskArguments) -> int:
        return args.max_prompt_length or 200

    def source(self, args: TaskArguments) -> str:
        return args.dataset_name or gsm8k.HUB_NAME

    def hub_name(self, args: TaskArguments) -> str | None:
        return self.source(args) if gsm8k.local_path(self.source(args), "train") is None else None

    def reads_files(self) -> bool:
        return True


class OwnDataset(Task):
    """The user's own problems."""

    most_by_default = None

    def load(self, args: TaskArguments, wanted: Wanted) -> Dataset:
        return _first(own_dataset.load_own_dataset(args, wanted.split, wanted.tokenizer), wanted.most)

    def num_problems(self, args: TaskArguments) -> int:
        if args.num_train_problems is not None or self.hub_name(args) is not None:
            return super().num_problems(args)
        return len(self.load(args, Wanted("train", None)))

    def episodes(self, args: TaskArguments) -> Episodes:
        factory = args.environment_factory
        return Episodes(
            [tool_of(named("tools", name, {})) for name in args.tools],
            None if factory is None else _maker(named("environment_factory", factory, {})),
        )

    def has_episodes(self, args: TaskArguments) -> bool:
        return bool(args.tools or args.environment_factory)

    def longest_prompt(self, args: TaskArguments) -> int | None:
        return args.max_prompt_length

    def source(self, args: TaskArguments) -> str:
        return str(args.dataset_name)

    def hub_name(self, args: TaskArguments) -> str | None:
        return self.source(args) if own_dataset.is_on_the_hub(self.source(args)) else None

    def reads_files(self) -> bool:
        return True


class Script(Task):
    """The problems of the trainer that a script of the user's own makes; `dataset_name` is the function's name."""

    most_by_default = None

    def load(self, args: TaskArguments, wanted: Wanted) -> Dataset:
        dataset = script.load_script(self.source(args), wanted.split)
        if wanted.tokenizer is not None:
            check_conversations(dataset["prompt"], wanted.tokenizer)
        return _first(dataset, wanted.most)

    def num_problems(self, args: TaskArguments) -> int:
        return len(self.load(args, Wanted("train", None)))

    def episodes(self, args: TaskArguments) -> Episodes:
        parts = script.parts_of(self.source(args))
        if parts.rollout_func is not None:
            raise ValueError(
                f"trainer_factory: the trainer of {args.dataset_name} has a rollout_func, which draws with a trainer "
                "of its own and as it likes; completions can be drawn again of single turns, tools and "
                "environment_factory."
            )
        factories = parts.environment_factories
        single = factories is not None and None in factories  # as TRL keeps one that is for every row
        return Episodes(parts.tools, factories[None] if factories and single else factories)

    def has_episodes(self, args: TaskArguments) -> bool:
        parts = script.parts_of(self.source(args))
        return bool(parts.tools or parts.environment_factories or parts.rollout_func)

    def source(self, args: TaskArguments) -> str:
        return str(args.dataset_name)


TASKS: dict[str, Task] = {
    "word_problems": WordProblems(),
    "gsm8k": GSM8K(),
    "calculator": Calculator(),
    "explore": LeadWords(),
    "trap": LeadWords(),
    "dataset": OwnDataset(),
    script.SCRIPT: Script(),
}


def tool_of(one: Named) -> Callable[..., Any]:
    """
    A function that the policy may call.

    Raises:
        ValueError: when it cannot be told to the model what it does and takes.
    """
    _check_described(f"tools: {one.name}", one.value)
    return one.value


def _check_described(name: str, function: Callable[..., Any]) -> None:
    from transformers.utils import get_json_schema

    try:
        get_json_schema(function)
    except Exception as error:  # transformers has one of its own for a docstring, and others come from the function
        raise ValueError(
            f"{name} needs a docstring that describes it and each argument, and type hints: {described(error)}."
        ) from error


def _maker(one: Named) -> Callable[[], Any]:
    if not callable(one.value):
        raise ValueError(f"environment_factory: {one.name} is no class or function, it is {one.value!r:.80}.")
    if not inspect.isclass(one.value):  # what it makes is not known yet
        return one.value
    methods = dict(inspect.getmembers(one.value, inspect.isfunction))
    if "reset" not in methods:
        raise ValueError(f"environment_factory: {one.name} has no method reset, which begins an episode.")
    for name, method in methods.items():
        if not name.startswith("_") and name not in ("reset", "get_reward"):
            _check_described(f"environment_factory: {one.name}.{name}, which the policy may call,", method)
    return one.value


def check_task(task: TaskArguments, model: str) -> None:
    """
    Check that the settings of the task are there, and that its episodes can be drawn.

    Raises:
        ValueError: for a dataset without a name, tools that cannot be imported or described, and an embedded model
            that was not taught to call.
    """
    if task.task == "dataset" and not task.dataset_name:
        raise ValueError(
            "task is dataset, but dataset_name is not set. Name a file, a folder, or a dataset of the hub."
        )
    if not task_of(task).has_episodes(task):
        return
    task_of(task).episodes(task)
    if model == "embedded":
        raise ValueError(
            f"task is {task.task}, with tools, but the embedded model calls none. Set model_name_or_path: "
            "embedded-agent, or a model of your own."
        )


def task_of(task: TaskArguments) -> Task:
    """The entry of the registry."""
    return TASKS[str(task.task)]


def load_task(task: TaskArguments, tokenizer: PreTrainedTokenizerBase | None, seed: int) -> tuple[Dataset, Dataset]:
    """
    The training problems and the held-out problems, with the columns `prompt`, `prompt_id`, and `answer` if there are
    answers.

    Args:
        tokenizer: None: prompts are not sorted out by their length.

    Raises:
        OSError: when a file or a dataset of the hub cannot be read.
        ValueError: when a record cannot be parsed, or none is left.
    """
    most = task.num_train_problems or task_of(task).most_by_default
    training = task_of(task).load(task, Wanted("train", most, tokenizer, seed))
    return training, task_of(task).load(task, Wanted("test", task.num_eval_problems, tokenizer))
