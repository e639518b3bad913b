"""What a person sees in the terminal: a progress bar, plain-text completions, and silence from the libraries."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

from transformers import ProgressCallback, TrainerControl, TrainerState, TrainingArguments
from trl.trainer import grpo_trainer

from trl_entropy.runs.metrics import PASS_AT_1

# ANSI sequences first (CSI, OSC up to its end, two-character escapes), then whatever control character is left.
_CONTROL = re.compile(
    r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)?|\x1b[@-Z\\-_]?"
    r"|[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)
_SHOWN = {"reward": "reward", "entropy/policy": "entropy", "step_time": "s/step"}


def plain_text(text: str) -> str:
    """`text` without control characters, ANSI sequences and direction marks; tabs and line ends stay."""
    return _CONTROL.sub("", text)


def _plain_entry(entry: Any) -> Any:
    """A completion or prompt, string or conversation, as plain text."""
    if isinstance(entry, str):
        return plain_text(entry)
    if isinstance(entry, list):
        return [_plain_entry(item) for item in entry]
    if isinstance(entry, dict):
        return {name: _plain_entry(item) for name, item in entry.items()}
    return entry


@contextlib.contextmanager
def printing_plain_text() -> Iterator[None]:
    """Clean the samples that TRL prints (`num_completions_to_print`): a completion must not steer the terminal."""
    original = grpo_trainer.print_prompt_completions_sample

    def printing(prompts: Any, completions: Any, *args: Any, **kwargs: Any) -> None:
        original(_plain_entry(list(prompts)), _plain_entry(list(completions)), *args, **kwargs)

    grpo_trainer.print_prompt_completions_sample = printing
    try:
        yield
    finally:
        grpo_trainer.print_prompt_completions_sample = original


class ConsoleProgress(ProgressCallback):
    """The Trainer's progress bar with reward, entropy and step time beside it, in place of a dictionary a step."""

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        if not state.is_world_process_zero or self.training_bar is None or not logs:
            return
        shown = {label: f"{logs[key]:.3f}" for key, label in _SHOWN.items() if logs.get(key) is not None}
        if shown:
            self.training_bar.set_postfix(shown)
        if "eval_reward" in logs:
            evaluation = {name.removeprefix("eval_"): value for name, value in logs.items()}
            self.training_bar.write(f"step {state.global_step:>4}  held out: {describe_evaluation(evaluation)}")

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """No second bar."""


def describe_evaluation(row: Mapping[str, Any]) -> str:
    """An evaluation in a line: pass@1 where that reward is used, else the mean reward; entropy."""
    quality = f"pass@1 {row[PASS_AT_1]:.3f}" if PASS_AT_1 in row else f"reward {row['reward']:.3f}"
    return f"{quality}, entropy {row['entropy']:.3f} nats/token"


def quiet_libraries() -> None:
    """Keep libraries to their errors. Called by the entry points only: a user's own script keeps its settings."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    for name in ("transformers", "datasets", "accelerate", "trl", "deepspeed", "DeepSpeed", "torch"):
        logging.getLogger(name).setLevel(logging.ERROR)
    import datasets
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
