"""Output to the terminal: the progress bar, completions as plain text, and fewer messages from the libraries."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import re
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

from transformers import (
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK
from trl.trainer import grpo_trainer

from trl_entropy.runs.evaluations import evaluation_of
from trl_entropy.runs.metrics import PASS_AT_1
from trl_entropy.runs.strict_json import Row

# ANSI sequences first (CSI, OSC up to its end, two-character escapes), then whatever control character is left.
_CONTROL = re.compile(
    r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)?|\x1b[@-Z\\-_]?"
    r"|[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)
_SHOWN = {"reward": "reward", "entropy/policy": "entropy", "step_time": "s/step"}


def plain_text(text: str) -> str:
    """`text` without ANSI sequences, control characters and text-direction marks; tabs and line breaks are kept."""
    return _CONTROL.sub("", text)


def _plain_entry(entry: object) -> object:
    """A prompt or completion, a string or a conversation, with [`plain_text`] applied to every string in it."""
    if isinstance(entry, str):
        return plain_text(entry)
    if isinstance(entry, list):
        return [_plain_entry(item) for item in entry]
    if isinstance(entry, dict):
        return {name: _plain_entry(item) for name, item in entry.items()}
    return entry


@contextlib.contextmanager
def printing_plain_text() -> Iterator[None]:
    """Inside, the samples that TRL prints (`num_completions_to_print`) cannot send control codes to the terminal."""
    original = grpo_trainer.print_prompt_completions_sample

    def printing(prompts: Iterable[object], completions: Iterable[object], *args: object, **kwargs: object) -> None:
        original(_plain_entry(list(prompts)), _plain_entry(list(completions)), *args, **kwargs)

    grpo_trainer.print_prompt_completions_sample = printing
    try:
        yield
    finally:
        grpo_trainer.print_prompt_completions_sample = original


class ConsoleProgress(ProgressCallback):
    """The Trainer's progress bar, which shows reward, entropy and step time; the metrics of a step are not printed."""

    training_bar: Any

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Row | None = None,
        **kwargs: object,
    ) -> None:
        if not state.is_world_process_zero or self.training_bar is None or not logs:
            return
        shown = {label: f"{logs[key]:.3f}" for key, label in _SHOWN.items() if logs.get(key) is not None}
        if shown:
            self.training_bar.set_postfix(shown)
        if any(key.startswith("eval_") for key in logs):
            evaluation, name = evaluation_of(logs)
            named = f"held out, {name}" if name else "held out"
            self.training_bar.write(f"step {state.global_step:>4}  {named}: {describe_evaluation(evaluation)}")

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Show no progress bar for the evaluation."""

    def end(self) -> None:
        """Close the bar of a training that has ended with an exception, so that the exception is what is said last."""
        bar, self.training_bar = self.training_bar, None
        if bar is not None:
            bar.close()


def describe_evaluation(row: Row) -> str:
    """One line: pass@1 if the run has the reward whose mean it is, else the mean reward; then the entropy."""
    key, name = (PASS_AT_1, "pass@1") if PASS_AT_1 in row else ("reward", "reward")
    return f"{name} {_number(row.get(key))}, entropy {_number(row.get('entropy'))} nats/token"


def _number(value: float | None) -> str:
    return f"{math.nan if value is None else value:.3f}"


def use_progress_bar(trainer: Trainer, callbacks: Iterable[object]) -> None:
    """
    Have a trainer show [`ConsoleProgress`] in the place of transformers' bar, which prints all metrics of a step; with
    `disable_tqdm` nothing, in the place of its printer. A notebook keeps its table.

    Args:
        callbacks: the user's own, classes or instances; a bar or printer among them is the user's choice, and stays.
    """
    kind = PrinterCallback if trainer.args.disable_tqdm else DEFAULT_PROGRESS_CALLBACK
    if kind not in (PrinterCallback, ProgressCallback):
        return
    added = [callback for callback in trainer.callback_handler.callbacks if type(callback) is kind]
    trainer.remove_callback(added[-1])  # transformers adds it after the user's
    classes = [callback if isinstance(callback, type) else type(callback) for callback in callbacks]
    if kind is ProgressCallback and not any(issubclass(each, ProgressCallback) for each in classes):
        trainer.add_callback(ConsoleProgress)


@contextlib.contextmanager
def saying_once(name: str) -> Iterator[None]:
    """Inside, the logger `name` says each message once, and on rank 0 alone, where a command repeats a check."""
    said: set[str] = set()

    def is_new(record: logging.LogRecord) -> bool:
        message = record.getMessage()
        if message in said or int(os.environ.get("RANK", "0")) > 0:
            return False
        said.add(message)
        return True

    logger = logging.getLogger(name)
    logger.addFilter(is_new)
    try:
        yield
    finally:
        logger.removeFilter(is_new)


def quiet_libraries() -> None:
    """Let the libraries report errors only. Only the commands call this: a user's own script keeps its settings."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    for name in ("transformers", "datasets", "accelerate", "trl", "deepspeed", "DeepSpeed", "torch"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # It sets its level when it is imported, and says of every machine without a GPU that it has found none.
    logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)
    import datasets
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
