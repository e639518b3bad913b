"""The model that RL starts from: by name, from a folder, from an SFT adapter's folder, or the embedded one."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from peft import PeftModel
    from trl import ModelConfig

logger = logging.getLogger(__name__)

EMBEDDED_MODEL = "embedded"
ADAPTER_CONFIG = "adapter_config.json"


def is_adapter(path: str) -> bool:
    """Whether `path` is a local folder that holds an adapter, not a whole model."""
    return (Path(path) / ADAPTER_CONFIG).exists()


def base_model_of(path: str) -> str:
    """Name or path of the model that the adapter in the folder `path` was trained on."""
    return json.loads((Path(path) / ADAPTER_CONFIG).read_text(encoding="utf-8"))["base_model_name_or_path"]


def check_model(model: ModelConfig) -> None:
    """
    Raises:
        ValueError: for settings of the model that RL cannot start from, before anything is loaded.
    """
    if model.use_peft and model.lora_dropout:
        raise ValueError(
            f"lora_dropout is {model.lora_dropout}: with dropout the policy that is updated is not the one that "
            "sampled, and old and new log-probabilities differ by noise. Set lora_dropout=0."
        )
    name = model.model_name_or_path
    if model.use_peft and is_adapter(name):
        raise ValueError(
            f"{name} holds an adapter, which RL goes on training, and use_peft=True asks for a new one. Set "
            "use_peft=False, or merge the adapter first (trl-entropy sft --merge_adapter True) and name the merged "
            "folder."
        )


def load_adapter(
    path: str, quantization_config: Any = None, keep_dtype: bool = False, **init_kwargs: Any
) -> PeftModel:
    """
    The adapter of the folder `path` on its base model, trainable, without dropout.

    TRL takes it as it is, without a `peft_config`; with `beta > 0` its reference is a copy of the adapter as loaded.

    Args:
        quantization_config: of the base model.
        keep_dtype: leave the adapter in the base model's dtype, which ZeRO-3 needs; else it is float32.
        init_kwargs: of the base model's `from_pretrained`.
    """
    from peft import PeftConfig, PeftModel
    from trl.trainer.utils import create_model_from_path

    config = PeftConfig.from_pretrained(path)
    if getattr(config, "lora_dropout", 0.0):
        logger.info("adapter %s: dropout %s set to 0 for RL", path, config.lora_dropout)
        config.lora_dropout = 0.0
    if quantization_config is not None:
        init_kwargs["quantization_config"] = quantization_config
    # One device a process; "auto", TRL's default, spreads the model over all of them.
    base = create_model_from_path(config.base_model_name_or_path, device_map=None, **init_kwargs)
    return PeftModel.from_pretrained(
        base, path, config=config, is_trainable=True, autocast_adapter_dtype=not keep_dtype
    )


def model_init_kwargs(model: ModelConfig) -> dict[str, Any]:
    """What TRL's `ModelConfig` says about loading, for `from_pretrained`."""
    settings = {
        "revision": model.model_revision,
        "attn_implementation": model.attn_implementation,
        "dtype": model.dtype,
    }
    return {name: value for name, value in settings.items() if value is not None}
