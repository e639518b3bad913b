"""The resume contract: the settings that a resumed run must share with the run that wrote its checkpoint."""

from __future__ import annotations

import dataclasses
import json
from fnmatch import fnmatchcase

from trl_entropy.config.dr_grpo import DrGRPOConfig
from trl_entropy.config.setting import default_of, own_settings

# Fields of TRL and transformers that may differ: logging, saving, evaluation, the hub, where vLLM runs, how data are
# loaded and memory is saved. All others are compared, those of later versions too. A field with * stands for all that
# begin so.
# fmt: off
FREE_UPSTREAM = (
    "output_dir", "run_name", "project", "resume_from_checkpoint", "do_*", "local_rank", "debug",
    "skip_memory_metrics", "log_*", "logging_*", "report_to", "disable_tqdm", "trackio_*",
    "num_completions_to_print", "include_*", "eval_*", "per_device_eval_batch_size", "batch_eval_metrics",
    "prediction_loss_only", "num_generations_eval", "*_full_eval", "save_*", "enable_jit_checkpoint",
    "load_best_model_at_end", "metric_for_best_model", "greater_is_better",
    "restore_callback_states_from_checkpoint", "push_to_hub", "hub_*", "dataloader_num_workers",
    "dataloader_pin_memory", "dataloader_persistent_workers", "dataloader_prefetch_factor",
    "dataloader_multiprocessing_context", "dataloader_in_order", "remove_unused_columns", "accelerator_config",
    "parallelism_config", "gradient_checkpointing*", "activation_checkpointing*", "torch_empty_cache_steps",
    "ddp_*", "deepspeed", "fsdp*", "ds3_gather_for_generation", "model_init_kwargs", "trust_remote_code",
    "vllm_mode", "vllm_model_impl", "vllm_enable_sleep_mode", "vllm_server_*", "vllm_group_port",
    "vllm_gpu_memory_utilization", "vllm_max_model_length", "vllm_tensor_parallel_size",
)
# fmt: on
_LENGTH = ("max_steps", "num_train_epochs")
_CONSTANT_SCHEDULES = ("constant", "constant_with_warmup")


def contract_settings(args: DrGRPOConfig, **planned: object) -> dict[str, object]:
    """
    The settings that change training, with their values as JSON has them; known before any model is loaded.

    Args:
        planned: values that will be other than `args` says, and settings that stand elsewhere; None: leave this
            setting out.
    """
    plugin = args.deepspeed_plugin
    values = {name: getattr(args, name) for name in upstream_settings()} | own_training_values(args)
    fsdp = f"FSDP{args.fsdp_version}" if args.fsdp_version else "plain or DDP"
    values |= {"engine": f"ZeRO-{plugin.zero_stage}" if plugin else fsdp, "world_size": args.world_size}
    values["dtype"] = (args.model_init_kwargs or {}).get("dtype")
    for name in _unread_lengths(args):
        del values[name]
    unknown = {name for name, value in planned.items() if value is None}
    values = {name: value for name, value in (values | planned).items() if name not in unknown}
    return json.loads(json.dumps(values, default=lambda value: getattr(value, "value", str(value))))


def upstream_settings() -> list[str]:
    """The fields of TRL and transformers that make another run if they change."""
    own = own_settings(DrGRPOConfig)
    names = [field.name for field in dataclasses.fields(DrGRPOConfig) if field.name not in own]
    return [name for name in names if not any(fnmatchcase(name, pattern) for pattern in FREE_UPSTREAM)]


def _unread_lengths(args: DrGRPOConfig) -> tuple[str, ...]:
    """The lengths that change nothing before the run's end, or are to change."""
    if args.lr_scheduler_type in _CONSTANT_SCHEDULES or args.additional_steps:
        return _LENGTH
    return ("num_train_epochs",) if args.max_steps > 0 else ()


def own_training_values(args: DrGRPOConfig) -> dict[str, object]:
    """
    This package's settings that change training, and their values.

    A value that trains as the default does (`entropy_control="report"`) counts as the default, and the settings of a
    control that is off are left out: they may change between a run and the one that resumes it.
    """
    settings, values = own_settings(args), dict[str, object]()
    for name, setting in settings.items():
        value, changing = getattr(args, name), setting.changes_training
        if changing:
            neutral = isinstance(changing, tuple) and value not in changing
            values[name] = default_of(args, name) if neutral else value
    off = {name for name in values if settings[name].probe == name and values[name] == default_of(args, name)}
    return {name: value for name, value in values.items() if name in off or settings[name].probe not in off}
