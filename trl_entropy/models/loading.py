"""The model from which RL starts: by name, from a folder with a model or an adapter, or the embedded one."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase
    from transformers.utils.quantization_config import QuantizationConfigMixin
    from trl import ModelConfig

logger = logging.getLogger(__name__)

EMBEDDED_MODEL = "embedded"
EMBEDDED_AGENT = "embedded-agent"  # the same model, taught to call a calculator
EMBEDDED_MODELS = (EMBEDDED_MODEL, EMBEDDED_AGENT)
ADAPTER_CONFIG = "adapter_config.json"


def is_adapter(path: str) -> bool:
    """Whether `path` is a local folder with an adapter instead of a whole model."""
    return (Path(path) / ADAPTER_CONFIG).exists()


def base_model_of(path: str) -> str:
    """The name or path of the model to which the adapter in the folder `path` belongs."""
    return json.loads((Path(path) / ADAPTER_CONFIG).read_text(encoding="utf-8"))["base_model_name_or_path"]


def check_model(model: ModelConfig) -> None:
    """
    Check the settings of the model before anything is loaded.

    Raises:
        ValueError: when RL cannot start with these settings.
    """
    if model.use_peft and model.lora_dropout:
        raise ValueError(
            f"lora_dropout is {model.lora_dropout}: with dropout, the trained policy is not the policy that "
            "sampled, and old and new log-probabilities differ by noise. Set lora_dropout=0."
        )
    name = model.model_name_or_path
    if model.use_peft and is_adapter(name):
        raise ValueError(
            f"{name} holds an adapter, which RL would continue to train, but use_peft=True asks for a new one. Set "
            "use_peft=False, or merge the adapter first (trl-entropy sft --merge_adapter True) and name the merged "
            "folder."
        )


def load_tokenizer(name: str, **init_kwargs: Any) -> PreTrainedTokenizerBase:
    """
    The tokenizer of a model, by name or from a folder.

    Args:
        init_kwargs: for `from_pretrained`: the revision of the model, and so on.

    Raises:
        ValueError: naming the model, when there is none.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name, **init_kwargs)
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        raise ValueError(f"model_name_or_path={name}: its tokenizer cannot be loaded. {error}") from error


def load_adapter(
    path: str, quantization_config: QuantizationConfigMixin | None = None, keep_dtype: bool = False, **init_kwargs: Any
) -> PeftModel:
    """
    The base model with the adapter of the folder `path`, trainable and without dropout.

    Pass it to TRL's trainer without a `peft_config`. With `beta > 0` TRL's reference is a copy of the adapter as
    loaded.

    Args:
        quantization_config: for the base model.
        keep_dtype: keep the adapter in the base model's dtype, which ZeRO-3 needs; otherwise it is float32.
        init_kwargs: for the base model's `from_pretrained`.
    """
    from peft import PeftConfig, PeftModel
    from trl.trainer.utils import create_model_from_path

    config = PeftConfig.from_pretrained(path)
    if getattr(config, "lora_dropout", 0.0):
        logger.info("adapter %s: dropout %s is set to 0 for RL", path, config.lora_dropout)
        config.lora_dropout = 0.0
    if quantization_config is not None:
        init_kwargs["quantization_config"] = quantization_config
    # Each process uses one device; TRL's default, "auto", would spread the model over all of them.
    base = create_model_from_path(config.base_model_name_or_path, device_map=None, **init_kwargs)
    return PeftModel.from_pretrained(
        base, path, config=config, is_trainable=True, autocast_adapter_dtype=not keep_dtype
    )


def model_init_kwargs(model: ModelConfig) -> dict[str, str]:
    """The arguments for `from_pretrained` that TRL's `ModelConfig` sets."""
    settings = {
        "revision": model.model_revision,
        "attn_implementation": model.attn_implementation,
        "dtype": model.dtype,
    }
    return {name: value for name, value in settings.items() if value is not None}


def model_settings(model: ModelConfig) -> dict[str, Any]:
    """What `config.yaml` says about the model that training starts from; `trl-entropy evaluate` reads it."""
    names = ("model_name_or_path", "model_revision", "dtype", "load_in_4bit", "load_in_8bit")
    return {name: getattr(model, name) for name in names}
