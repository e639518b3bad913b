"""Which settings of a run differ from their defaults: what a reader of its page sees first."""

from __future__ import annotations

import dataclasses
import enum

from transformers import TrainingArguments

# What names a place or a process, and what transformers and TRL derive from other settings.
_NOT_CHOSEN = {
    "output_dir", "logging_dir", "run_name", "resume_from_checkpoint", "hub_model_id", "hub_token", "local_rank",
    "disable_tqdm", "do_train", "do_eval", "do_predict", "accelerator_config", "debug", "dataloader_pin_memory",
    "model_init_kwargs", "activation_checkpointing", "pad_to_multiple_of", "generation_batch_size",
    "steps_per_generation", "distributed_state", "deepspeed_plugin",
}  # fmt: skip


def changed_settings(args: TrainingArguments) -> dict[str, list[object]]:
    """By name: the default and the value of each setting that differs from its default, secrets hidden."""
    values, found = args.to_dict(), {}
    for field in dataclasses.fields(args):
        default, name = _default(field), field.name
        if name in _NOT_CHOSEN or name not in values or default is dataclasses.MISSING:
            continue
        if _plain(values[name]) != _plain(default):
            found[name] = [_plain(default), _plain(values[name])]
    return found


def _default(field: dataclasses.Field) -> object:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _plain(value: object) -> object:
    if isinstance(value, list) and not value:  # what transformers makes of report_to: none
        return "none"
    return value.value if isinstance(value, enum.Enum) else value
