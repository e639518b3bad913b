"""
Fine-tune a model on demonstrations with TRL's `SFTTrainer`, so that RL starts from the right format and some skill.

    trl-entropy sft --config configs/sft-qwen2.5-1.5b-gsm8k.yaml

On several GPUs: `accelerate launch -m trl_entropy.sft --config ...`.
"""

from __future__ import annotations

import dataclasses
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from trl_entropy.config.command_line import parse_sft
from trl_entropy.config.settings_file import sentence
from trl_entropy.models.fine_tuning import train_sft
from trl_entropy.models.loading import load_tokenizer, model_init_kwargs
from trl_entropy.runs.console import quiet_libraries
from trl_entropy.runs.counted import counted
from trl_entropy.runs.directory import RunDirectory
from trl_entropy.runs.file_errors import check_writable, describe
from trl_entropy.tasks.demonstrations import DemonstrationArguments, load_demonstrations

if TYPE_CHECKING:
    from trl import ModelConfig, SFTConfig, SFTTrainer


def main(argv: list[str] | None = None) -> None:
    """Train on demonstrations and save model or adapter, with the tokenizer, in `output_dir`."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("trl_entropy").setLevel(logging.INFO)
    quiet_libraries()
    try:
        task, args, model = parse_sft(argv)
    except (ValueError, ImportError) as error:
        sys.exit(f"Error in the settings: {sentence(error)}")
    try:
        check_writable(Path(args.output_dir))
        fine_tune(task, args, model)
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        logging.getLogger("trl_entropy").debug("%s", error, exc_info=True)
        sys.exit(f"Error: {sentence(describe(error, Path(args.output_dir)))}")


def fine_tune(task: DemonstrationArguments, args: SFTConfig, model: ModelConfig) -> None:
    """Load demonstrations and model, train, and save."""
    from trl import get_peft_config, get_quantization_config

    from trl_entropy.engine.fsdp2_on_cpu import shard_on_cpu_if_asked

    shard_on_cpu_if_asked()
    tokenizer = load_tokenizer(model.model_name_or_path, revision=model.model_revision)
    demonstrations = load_demonstrations(task, tokenizer, args.seed)
    args.model_init_kwargs = {**(args.model_init_kwargs or {}), **model_init_kwargs(model)}
    if (quantization := get_quantization_config(model)) is not None:
        args.model_init_kwargs["quantization_config"] = quantization
    trainer = train_sft(model.model_name_or_path, tokenizer, demonstrations, args, get_peft_config(model))
    save(trainer, task, model)


def save(trainer: SFTTrainer, task: DemonstrationArguments, model: ModelConfig) -> None:
    """Save the trained weights, the tokenizer and the settings. Call on all ranks."""
    output_dir = Path(trainer.args.output_dir)
    trainer.save_model(str(output_dir))
    if not trainer.accelerator.is_main_process:
        return
    trainer.processing_class.save_pretrained(output_dir)
    settings = {**dataclasses.asdict(task), **dataclasses.asdict(model), **trainer.args.to_dict()}
    run = RunDirectory(output_dir)
    run.write_config(settings)
    run.write_environment(num_processes=trainer.args.world_size)
    if task.merge_adapter:
        trainer.accelerator.unwrap_model(trainer.model).merge_and_unload().save_pretrained(output_dir / "merged")
        trainer.processing_class.save_pretrained(output_dir / "merged")
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    last = f", last loss {losses[-1]:.4f}" if losses else ""
    print(f"SFT: {counted(trainer.state.global_step, 'step')}{last}; saved to {output_dir}")


if __name__ == "__main__":
    main()
