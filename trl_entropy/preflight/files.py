"""Checks of the files that a run reads: model, dataset, checkpoint. Nothing is downloaded or written."""

from __future__ import annotations

import os
from pathlib import Path

from trl_entropy.config.resume_contract import contract_settings
from trl_entropy.models.loading import EMBEDDED_MODEL
from trl_entropy.preflight.finding import Finding, Findings
from trl_entropy.preflight.plan import Plan
from trl_entropy.runs.checkpoints import CheckpointError, check_before_loading


def model_files(plan: Plan) -> Findings:
    """Weights and tokenizer, as far as they are on this machine."""
    name, here = str(plan.model.model_name_or_path), plan.hardware.is_this_machine
    if plan.shape is None or name == EMBEDDED_MODEL:
        return
    if Path(name).is_dir():
        yield from _local_tokenizer(Path(name), plan.shape.vocab_size)
    elif plan.shape.source.startswith("built-in"):
        offline = os.environ.get("HF_HUB_OFFLINE", "0") == "1"
        yield Finding(
            f"The weights of {name} are not on this machine"
            + (", and HF_HUB_OFFLINE=1 forbids a download." if offline else "; they will be downloaded."),
            "Download the model first, or name a folder that holds it." if offline else "",
            is_problem=here and offline,
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

    if not any((folder / name).exists() for name in ("tokenizer.json", "tokenizer_config.json")):
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
    """The file that `load_gsm8k` will read; for another machine a missing one is only a note."""
    if plan.task.task != "gsm8k":
        return
    name = plan.task.dataset_path
    path = Path(name) / "train.jsonl" if Path(name).is_dir() else Path(name)
    looks_local = path.suffix == ".jsonl" or path.is_absolute() or name.startswith(".")
    if looks_local and not path.is_file():
        yield Finding(
            f"dataset_path: there is no file {path} (seen from {Path.cwd()}).",
            "Correct the path; the folder must hold train.jsonl and test.jsonl.",
            plan.hardware.is_this_machine,
        )
    elif not path.is_file() and os.environ.get("HF_HUB_OFFLINE", "0") == "1":
        yield Finding(
            f"dataset_path {name} is on the hub; with HF_HUB_OFFLINE=1 it must be in the local cache.",
            "If it is not, name a local folder with train.jsonl and test.jsonl.",
            is_problem=False,
        )


def resume(plan: Plan) -> Findings:
    try:
        resumed_checkpoint(plan)
    except CheckpointError as error:
        yield Finding(str(error))


def resumed_checkpoint(plan: Plan) -> Path | None:
    """
    The checkpoint from which training will resume; None if it starts from the beginning.

    Raises:
        CheckpointError: when the checkpoint is incomplete or belongs to another run.
    """
    settings = contract_settings(plan.args, world_size=plan.world_size, engine=None)
    return check_before_loading(plan.args.resume_from_checkpoint, Path(plan.args.output_dir), settings)
