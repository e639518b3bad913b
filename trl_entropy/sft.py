"""
Supervised fine-tuning on TRL's `SFTTrainer`: gives a policy the format and the skill that RL then sharpens.

    trl-entropy sft --config configs/sft-qwen2.5-1.5b-gsm8k.yaml        # or under accelerate launch -m trl_entropy.sft
"""

from __future__ import annotations

import dataclasses
import logging
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trl_entropy.models.fine_tuning import train_sft
from trl_entropy.runs.console import quiet_libraries
from trl_entropy.runs.directory import RunDirectory

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase
    from trl import ModelConfig, SFTConfig, SFTTrainer


@dataclass
class DemonstrationArguments:
    """What is learned from; the settings of training are TRL's `SFTConfig`, those of the model its `ModelConfig`."""

    task: str = field(default="gsm8k", metadata={"help": "The task.", "choices": ["gsm8k", "word_problems"]})
    dataset_path: str = field(
        default="openai/gsm8k", metadata={"help": "gsm8k: name on the hub, or a local JSONL file or folder."}
    )
    num_demonstrations: int | None = field(default=None, metadata={"help": "Demonstrations, at most; unset: all."})
    max_prompt_length: int = field(default=200, metadata={"help": "gsm8k: drop prompts of more tokens than this."})
    merge_adapter: bool = field(
        default=False, metadata={"help": "Also write the model with its adapter merged in, to <output_dir>/merged."}
    )


def parse(argv: list[str] | None = None) -> tuple[DemonstrationArguments, SFTConfig, ModelConfig]:
    """Read the command line and its `--config` file; every error in a setting is raised here, before any loading."""
    from trl import ModelConfig, SFTConfig, TrlParser

    parser = TrlParser([DemonstrationArguments, SFTConfig, ModelConfig])
    parser.set_defaults(disable_tqdm=False)  # tqdm is off by default once transformers is silenced
    task, args, model = parser.parse_args_and_config(argv)
    if not model.model_name_or_path:
        raise ValueError("model_name_or_path is not set; name a model of the hub or a local folder.")
    if task.merge_adapter and not model.use_peft:
        raise ValueError("merge_adapter=True needs an adapter. Set use_peft=True, or merge_adapter=False.")
    if (Path(args.output_dir) / "config.yaml").exists() and args.resume_from_checkpoint is None:
        raise ValueError(f"{args.output_dir} already holds a run. Choose another --output_dir, or move it away.")
    return task, args, model


def load_demonstrations(task: DemonstrationArguments, tokenizer: PreTrainedTokenizerBase, seed: int) -> Dataset:
    """Prompts in the R1 template with worked solutions; columns `prompt` and `completion`."""
    if task.task == "word_problems":
        from trl_entropy.tasks import word_problems

        return word_problems.load_demonstrations(task.num_demonstrations or 4096, seed, flawed_share=0.0)
    from trl_entropy.tasks.gsm8k import load_gsm8k_demonstrations

    dataset = load_gsm8k_demonstrations(task.dataset_path, "train", tokenizer, task.max_prompt_length)
    return dataset.select(range(min(task.num_demonstrations or len(dataset), len(dataset))))


def main(argv: list[str] | None = None) -> None:
    """Parse, train, save model or adapter with the tokenizer into `output_dir`, for RL to start from."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("trl_entropy").setLevel(logging.INFO)
    quiet_libraries()
    try:
        task, args, model = parse(argv)
    except ValueError as error:
        sys.exit(f"Error in the settings: {error}")
    from transformers import AutoTokenizer
    from trl import get_peft_config, get_quantization_config

    from trl_entropy.models.loading import model_init_kwargs

    tokenizer = AutoTokenizer.from_pretrained(model.model_name_or_path)
    demonstrations = load_demonstrations(task, tokenizer, args.seed)
    args.model_init_kwargs = {**(args.model_init_kwargs or {}), **model_init_kwargs(model)}
    if (quantization := get_quantization_config(model)) is not None:
        args.model_init_kwargs["quantization_config"] = quantization
    trainer = train_sft(model.model_name_or_path, tokenizer, demonstrations, args, get_peft_config(model))
    save(trainer, task, model)


def save(trainer: SFTTrainer, task: DemonstrationArguments, model: ModelConfig) -> None:
    """Write what was trained, its tokenizer and its settings. Call on all ranks."""
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
        merged: Any = trainer.accelerator.unwrap_model(trainer.model)
        merged.merge_and_unload().save_pretrained(output_dir / "merged")
        trainer.processing_class.save_pretrained(output_dir / "merged")
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    last = f", last loss {losses[-1]:.4f}" if losses else ""
    print(f"SFT: {trainer.state.global_step} steps{last}; saved to {output_dir}")


if __name__ == "__main__":
    main()
