"""Checks of the files that a run reads: model, dataset, checkpoint. Nothing is downloaded or written."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from trl_entropy.config.resume_contract import contract_settings
from trl_entropy.evaluation.problems import distinct
from trl_entropy.models.embedded import build_tokenizer
from trl_entropy.models.embedded_agent import build_agent_tokenizer
from trl_entropy.models.loading import EMBEDDED_AGENT, EMBEDDED_MODELS
from trl_entropy.preflight.finding import Finding, Findings
from trl_entropy.preflight.plan import Plan
from trl_entropy.runs.checkpoints import (
    CheckpointError,
    check_before_loading,
    describe_finished,
    is_finished,
)
from trl_entropy.runs.file_errors import describe
from trl_entropy.tasks.arguments import TaskArguments
from trl_entropy.tasks.completion_functions import metric_functions, planned_functions, reward_functions, tried
from trl_entropy.tasks.demonstrations import DemonstrationArguments, load_demonstrations
from trl_entropy.tasks.registry import Wanted, load_task, task_of
from trl_entropy.trainer.dataset_checks import check_datasets

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

_OF_TOKENIZERS = ("tokenizer.json", "tokenizer_config.json")


def model_files(plan: Plan) -> Findings:
    """Weights and tokenizer, as far as they are on this machine."""
    name, here = str(plan.model.model_name_or_path), plan.hardware.is_this_machine
    if plan.shape is None or name in EMBEDDED_MODELS:
        return
    if Path(name).is_dir():
        yield from _local_tokenizer(Path(name), plan.shape.vocab_size)
    elif plan.shape.source.startswith("built-in"):
        offline = os.environ.get("HF_HUB_OFFLINE", "0") == "1"
        stops = here and offline
        yield Finding(
            f"The weights of {name} are not on this machine"
            + (", and HF_HUB_OFFLINE=1 forbids a download." if offline else "; they will be downloaded."),
            "Download the model first, or name a folder that holds it." if offline else "",
            is_problem=stops,
            stops=stops,
        )


def positions(plan: Plan) -> Findings:
    """Whether sequences are longer than the model was made for; rotary embeddings allow it, at a loss of quality."""
    if plan.shape is not None and 0 < plan.shape.max_positions < plan.sequence_length:
        yield Finding(
            f"Prompt and completion together may have {plan.sequence_length} tokens, the model was made for "
            f"{plan.shape.max_positions}.",
            "Lower max_completion_length or max_prompt_length.",
            is_problem=False,
        )


def _local_tokenizer(folder: Path, vocab_size: int) -> Findings:
    from transformers import AutoTokenizer

    if not any((folder / name).exists() for name in _OF_TOKENIZERS):
        yield Finding(f"{folder} holds no tokenizer.", "Save it there: tokenizer.save_pretrained(folder).")
        return
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if tokenizer.eos_token_id is None:
        yield Finding(f"The tokenizer of {folder} has no end-of-text token: no completion ends.", "Set eos_token.")
    if len(tokenizer) > vocab_size:
        yield Finding(
            f"The tokenizer of {folder} has {len(tokenizer)} entries, the model {vocab_size} embeddings.",
            "Use the model's own tokenizer.",
        )


def dataset(plan: Plan) -> Findings:
    """
    Whether the records that training will read can be read, and are enough for a step and for what probes draw.

    For another machine it is only a note that they are not here. Where the model's tokenizer is not here, prompts are
    counted before those that are too long are dropped, and conversations are not tried in its chat template.
    """

    held_out: list[Dataset] = []

    def check() -> None:
        problems = load_task(plan.task, _tokenizer_here(plan), plan.args.seed)
        check_datasets(plan.args, *problems)
        held_out.append(problems[1])
        tried(reward_functions(plan.task) + metric_functions(plan.task), first_rows(plan))

    yield from _readable(plan, plan.task, check)
    if held_out:
        try:
            distinct(held_out[0], plan.task)
        except ValueError as error:
            yield Finding(str(error), is_problem=plan.args.evaluate_checkpoints != "none")


def _tokenizer_here(plan: Plan) -> PreTrainedTokenizerBase | None:
    """That of an embedded model or of a model in a folder; None if there is none."""
    from transformers import AutoTokenizer

    name = str(plan.model.model_name_or_path)
    if name in EMBEDDED_MODELS:
        return build_agent_tokenizer() if name == EMBEDDED_AGENT else build_tokenizer()
    has_one = any((Path(name) / file).exists() for file in _OF_TOKENIZERS)
    return AutoTokenizer.from_pretrained(name) if has_one else None


def first_rows(plan: Plan) -> list[dict[str, Any]]:
    """The first training problems, on which rewards are tried; none of a dataset of the hub."""
    task = task_of(plan.task)
    if task.hub_name(plan.task) is not None:
        return []
    with _quiet("trl_entropy.tasks"):
        return list(task.load(plan.task, Wanted("train", 3)))


def demonstrations(plan: Plan) -> Findings:
    """Whether the records that supervised fine-tuning will read can be read."""
    task = cast(DemonstrationArguments, plan.task)
    of = TaskArguments(task=task.task, dataset_name=task.dataset_name)
    yield from _readable(plan, of, lambda: load_demonstrations(task, None, plan.args.seed))


def _readable(plan: Plan, of: TaskArguments, read: Callable[[], object]) -> Findings:
    """What `read` raises, as findings; a dataset of the hub is not looked up."""
    here, task = plan.hardware.is_this_machine, task_of(of)
    try:
        if (on_hub := task.hub_name(of)) is not None:
            yield from _on_the_hub(on_hub)
            return
        with _quiet("trl_entropy.tasks"):  # training says it
            read()
    except OSError as error:
        yield Finding(f"{describe(error)}.", is_problem=here)
    except ValueError as error:
        yield Finding(str(error), is_problem=here or not task.reads_files())


@contextlib.contextmanager
def _quiet(logger: str) -> Iterator[None]:
    """Inside, this logger and those below it say nothing but errors."""
    one = logging.getLogger(logger)
    level = one.level
    one.setLevel(logging.ERROR)
    try:
        yield
    finally:
        one.setLevel(level)


def _on_the_hub(name: str) -> Findings:
    if os.environ.get("HF_HUB_OFFLINE", "0") == "1":
        yield Finding(
            f"dataset_name {name} is on the hub; with HF_HUB_OFFLINE=1 it must be in the local cache.",
            "If it is not, name a local folder with train.jsonl and test.jsonl.",
            is_problem=False,
        )


def resume(plan: Plan) -> Findings:
    try:
        found = resumed_checkpoint(plan)
    except CheckpointError as error:
        yield Finding(str(error))
        return
    args = plan.args
    if found is not None and not args.additional_steps and is_finished(found, args.max_steps, args.num_train_epochs):
        yield Finding(describe_finished(found, "will be"), is_problem=False)


def resumed_checkpoint(plan: Plan) -> Path | None:
    """
    The checkpoint from which training will resume; None if it starts from the beginning.

    Raises:
        CheckpointError: when the checkpoint is incomplete or belongs to another run.
    """
    args = plan.args
    settings = contract_settings(
        args, world_size=plan.world_size, engine=None, dtype=None, **planned_functions(plan.task)
    )
    return check_before_loading(
        args.resume_from_checkpoint, Path(args.output_dir), settings, args.resume_allow_changes
    )
