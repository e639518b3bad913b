"""The resume contract: the settings that a resumed run must share with the run that wrote its checkpoint."""

from __future__ import annotations

import json

from trl_entropy.config.dr_grpo import DrGRPOConfig
from trl_entropy.config.setting import default_of, own_settings

# Fields of TRL and transformers that make another run if they change: what is sampled, the loss, and the optimizer's
# step. Logging, saving and evaluation are not in, nor how the work is laid out where that changes no number.
# fmt: off
UPSTREAM_SETTINGS = (
    "seed", "per_device_train_batch_size", "gradient_accumulation_steps", "steps_per_generation", "num_iterations",
    "num_generations", "max_completion_length", "temperature", "top_k", "top_p", "min_p", "repetition_penalty",
    "use_vllm", "shuffle_dataset", "loss_type", "scale_rewards", "beta", "epsilon", "epsilon_high",
    "mask_truncated_completions", "learning_rate", "lr_scheduler_type", "warmup_steps", "optim", "adam_beta1",
    "adam_beta2", "adam_epsilon", "weight_decay", "max_grad_norm", "bf16", "fp16", "disable_dropout", "max_steps",
)
# fmt: on
_CONSTANT_SCHEDULES = ("constant", "constant_with_warmup")


def contract_settings(args: DrGRPOConfig, **planned: object) -> dict[str, object]:
    """
    The settings that change training, with their values as JSON has them; known before any model is loaded.

    Args:
        planned: values that will be other than `args` says; None: leave this setting out.
    """
    plugin = args.deepspeed_plugin
    values: dict[str, object] = {name: getattr(args, name, None) for name in UPSTREAM_SETTINGS}
    values |= own_training_values(args)
    values |= {"engine": f"ZeRO-{plugin.zero_stage}" if plugin else "plain or DDP", "world_size": args.world_size}
    if values["lr_scheduler_type"] in _CONSTANT_SCHEDULES or args.additional_steps:
        del values["max_steps"]  # the length of the run changes nothing before its end, or is to change
    values |= planned
    for name in [name for name, value in planned.items() if value is None]:
        del values[name]
    return json.loads(json.dumps(values, default=lambda value: getattr(value, "value", str(value))))


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
