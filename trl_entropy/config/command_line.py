"""The command lines of `trl-entropy train` and `sft`: YAML and flags become task, training arguments and model."""

from __future__ import annotations

from pathlib import Path

from trl import ModelConfig, SFTConfig, TrlParser

from trl_entropy.config.dr_grpo import DrGRPOConfig
from trl_entropy.models.loading import EMBEDDED_MODEL, check_model
from trl_entropy.runs.directory import RunDirectory
from trl_entropy.tasks.arguments import REWARDS, TaskArguments
from trl_entropy.tasks.demonstrations import DemonstrationArguments


def parse(argv: list[str] | None = None) -> tuple[TaskArguments, DrGRPOConfig, ModelConfig]:
    """Read the command line and its `--config` file; every error in a setting is raised here, before any loading."""
    parser = TrlParser([TaskArguments, DrGRPOConfig, ModelConfig])
    # tqdm is off by default once transformers is silenced.
    parser.set_defaults(lora_dropout=0.0, model_name_or_path=EMBEDDED_MODEL, disable_tqdm=False)
    task, args, model = parser.parse_args_and_config(argv)
    if unknown := [name for name in task.reward_funcs if name not in REWARDS]:
        raise ValueError(
            f"reward_funcs: {unknown} are not among the rewards of trl_entropy.tasks.rewards; use any of "
            f"{', '.join(REWARDS)}."
        )
    check_model(model)
    if RunDirectory(args.output_dir).metrics() and args.resume_from_checkpoint is None:
        raise ValueError(
            f"{args.output_dir} already holds a run. Choose another --output_dir, continue it with "
            "--resume_from_checkpoint, or move it away."
        )
    return task, args, model


def parse_sft(argv: list[str] | None = None) -> tuple[DemonstrationArguments, SFTConfig, ModelConfig]:
    """
    Read the command line of `trl-entropy sft` and its `--config` file.

    Raises:
        ValueError: for every error in the settings, before anything is loaded.
    """
    parser = TrlParser([DemonstrationArguments, SFTConfig, ModelConfig])
    parser.set_defaults(disable_tqdm=False)  # tqdm is off by default once transformers is silenced
    task, args, model = parser.parse_args_and_config(argv)
    if not model.model_name_or_path:
        raise ValueError("model_name_or_path is not set. Name a model on the hub or a local folder.")
    if task.merge_adapter and not model.use_peft:
        raise ValueError("merge_adapter=True needs an adapter. Set use_peft=True, or merge_adapter=False.")
    if (Path(args.output_dir) / "config.yaml").exists() and args.resume_from_checkpoint is None:
        raise ValueError(f"{args.output_dir} already holds a run. Choose another --output_dir, or move it away.")
    return task, args, model
