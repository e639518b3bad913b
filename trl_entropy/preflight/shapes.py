"""The sizes of a model from its `config.json` alone, built on torch's meta device, where tensors have no data."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from trl_entropy.config.settings_file import sentence
from trl_entropy.gradients.footprint import LayerSizes
from trl_entropy.models.loading import EMBEDDED_MODELS, base_model_of, is_adapter
from trl_entropy.preflight.finding import Finding
from trl_entropy.runs.strict_json import Json

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel
    from trl import ModelConfig


def _qwen2(hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, **more: object) -> Json:
    return {
        "model_type": "qwen2",
        "vocab_size": 151936,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": True,
        **more,
    }


# From the config.json of these models, for a machine without access to the hub. "-Instruct" has the same shape.
KNOWN_SHAPES: dict[str, Json] = {
    "Qwen/Qwen2.5-0.5B": _qwen2(896, 4864, 24, 14, 2),
    "Qwen/Qwen2.5-1.5B": _qwen2(1536, 8960, 28, 12, 2),
    "Qwen/Qwen2.5-3B": _qwen2(2048, 11008, 36, 16, 2),
    "Qwen/Qwen2.5-7B": _qwen2(3584, 18944, 28, 28, 4, vocab_size=152064, tie_word_embeddings=False),
    "Qwen/Qwen2.5-14B": _qwen2(5120, 13824, 48, 40, 8, vocab_size=152064, tie_word_embeddings=False),
    "Qwen/Qwen2.5-32B": _qwen2(5120, 27648, 64, 40, 8, vocab_size=152064, tie_word_embeddings=False),
    "Qwen/Qwen3-8B": _qwen2(
        4096,
        12288,
        36,
        32,
        8,
        model_type="qwen3",
        head_dim=128,
        tie_word_embeddings=False,
        max_position_embeddings=40960,
    ),
    "HuggingFaceTB/SmolLM2-135M": _qwen2(
        576, 1536, 30, 9, 3, model_type="llama", vocab_size=49152, max_position_embeddings=8192
    ),
}


class UnknownShape(ValueError):
    """There is no `config.json` of the model, and its shape is not in `KNOWN_SHAPES`."""


_WITHOUT_THE_MODEL = (
    "Give a folder with the model, or download it first. For an estimate by trl-entropy doctor the name of its base "
    f"model is enough (with --use_peft for an adapter), if it is one of {', '.join(KNOWN_SHAPES)}."
)


def found_shape(shape: Callable[[], ModelShape], found: list[Finding], here: bool = True) -> ModelShape | None:
    """
    What `shape` returns, or None; what is wrong with the model is then added to `found`.

    Args:
        here: whether the run is to start on this machine.
    """
    try:
        return shape()
    except UnknownShape as error:
        found.append(Finding(str(error), _WITHOUT_THE_MODEL, is_problem=here, stops=here))
    except (ValueError, OSError) as error:
        text = f"The model cannot be built with these settings: {sentence(error)}"
        found.append(Finding(text, stops="trust_remote_code" not in str(error)))  # which training may allow
    return None


@dataclass(frozen=True)
class ModelShape(LayerSizes):
    """
    The sizes of a model and its adapter; tied parameters count once.

    Attributes:
        module: the model with its adapter on the meta device: names, shapes and `requires_grad`, without data.
        source: where the shape comes from.
        num_parameters: parameters of the model without the adapter.
        num_quantised: weights of Linear layers except the language-model head, which bitsandbytes quantises.
    """

    module: nn.Module
    source: str
    num_parameters: int
    num_adapter: int
    num_trainable: int
    num_quantised: int
    max_positions: int


def model_shape(model: ModelConfig) -> ModelShape:
    """
    The shape of the model that `model` names, with its adapter.

    Raises:
        UnknownShape: when the model is not in a local folder, the hub's cache or `KNOWN_SHAPES`, and the hub cannot be
            reached.
        ValueError: when the adapter does not fit the model (from peft).
    """
    name = str(model.model_name_or_path)
    return shape_of_module(*_build(base_model_of(name) if is_adapter(name) else name), model)


def shape_of_module(module: nn.Module, source: str, model: ModelConfig) -> ModelShape:
    """
    The shape of a model that is there, with the adapter that `model` names.

    Args:
        module: one that has its adapter already gets no other.

    Raises:
        ValueError: when the adapter does not fit the model (from peft).
    """
    has_adapter = hasattr(module, "peft_config")
    own = (param for name, param in module.named_parameters() if not (has_adapter and "lora_" in name))
    num_parameters = _numel(own)
    num_quantised = sum(
        layer.weight.numel()
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear) and not name.endswith("lm_head")
    )
    config = module.config.get_text_config()
    module = module if has_adapter else with_adapter(module, model)
    return ModelShape(
        module=module,
        source=source,
        num_parameters=num_parameters,
        num_adapter=_numel(module.parameters()) - num_parameters,
        num_trainable=_numel(param for param in module.parameters() if param.requires_grad),
        num_quantised=num_quantised,
        **vars(LayerSizes.of(config)),
        max_positions=getattr(config, "max_position_embeddings", 0),
    )


def with_adapter(module: PreTrainedModel, model: ModelConfig, on_meta: bool = True) -> nn.Module:
    """
    `module` with the adapter of the folder that `model` names, or with a new one if it asks for that; its weights are
    not loaded, and are without data unless `on_meta` is False.
    """
    from peft import PeftConfig, get_peft_model
    from trl import get_peft_config

    name = str(model.model_name_or_path)
    config = PeftConfig.from_pretrained(name) if is_adapter(name) else get_peft_config(model)
    if config is None:
        return module
    config.inference_mode = False  # a saved config has True, which would freeze the adapter
    with torch.device("meta") if on_meta else contextlib.nullcontext():
        return get_peft_model(module, config)


def _numel(params: Iterable[nn.Parameter]) -> int:
    return sum(param.numel() for param in params)


def _build(name: str) -> tuple[PreTrainedModel, str]:
    """The model on the meta device, and where its shape comes from."""
    from transformers import AutoModelForCausalLM

    if name in EMBEDDED_MODELS:
        from trl_entropy.models.embedded import build_model, build_tokenizer

        tokenizer = build_tokenizer()
        with torch.device("meta"):
            return build_model(tokenizer), "built from code"
    config, source = read_config(name)
    with torch.device("meta"), without_zero3():
        return AutoModelForCausalLM.from_config(config), source


@contextlib.contextmanager
def without_zero3() -> Iterator[None]:
    """Turn off transformers' ZeRO-3 mode, where building a model is collective; here one rank builds alone."""
    from transformers.integrations import deepspeed

    kept = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = kept


def read_config(name: str) -> tuple[PretrainedConfig, str]:
    """A model's config and its source: a folder, the hub's cache, `KNOWN_SHAPES` or the hub, in this order."""
    from transformers import AutoConfig

    if Path(name).is_dir():
        if not (Path(name) / "config.json").exists():
            raise UnknownShape(f"model_name_or_path={name} is a folder without config.json.")
        return AutoConfig.from_pretrained(name), f"config.json of {name}"
    try:
        return AutoConfig.from_pretrained(name, local_files_only=True), "config.json in the hub's local cache"
    except OSError:  # it is not in the cache, which only a try can tell
        pass
    if (known := KNOWN_SHAPES.get(name.removesuffix("-Instruct"))) is not None:
        return AutoConfig.for_model(**known), "built-in table; the model's config.json is not on this machine"
    try:
        return AutoConfig.from_pretrained(name), "config.json from the hub"
    except OSError as error:
        raise UnknownShape(
            f"model_name_or_path={name} is no folder here and not in the hub's cache, and the hub cannot be reached."
        ) from error
