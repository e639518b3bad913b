"""A model of the same architecture as another, small enough to be tried in a second, from the configuration alone."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig, PreTrainedModel

_HEADS, _KV_HEADS, _HEAD_DIM = 4, 2, 8
_HIDDEN = _HEADS * _HEAD_DIM
_LENGTH = 64
# Setting of a configuration -> the largest value that a tiny model has.
_MOST: dict[str, int] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "embed_dim", "word_embed_proj_dim"), _HIDDEN),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads"), _HEADS),
    **dict.fromkeys(("decoder_attention_heads", "swa_num_attention_heads", "num_kv_shared_heads"), _HEADS),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "num_global_key_value_heads"), _KV_HEADS),
    **dict.fromkeys(("head_dim", "v_head_dim", "qk_nope_head_dim", "qk_rope_head_dim", "global_head_dim"), _HEAD_DIM),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "qk_head_dim", "n_inner"), 2 * _HEAD_DIM),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "ffn_hidden_size", "moe_intermediate_size", "d_ff"), _HIDDEN),
    **dict.fromkeys(("shared_expert_intermediate_size", "shared_intermediate_size", "expert_ffn_hidden_size"), 16),
    **dict.fromkeys(("block_ff_dim", "intermediate_size_mlp", "moe_shared_expert_intermediate_size"), _HIDDEN),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_moe_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "top_k_experts", "moe_topk", "moe_k", "moe_top_k"), 2),
    **dict.fromkeys(("n_group", "topk_group", "first_k_dense_replace", "num_dense_layers", "n_groups"), 1),
    **dict.fromkeys(("mamba_n_groups", "num_memory_blocks", "num_nextn_predict_layers"), 1),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_sequence_length"), _LENGTH),
    **dict.fromkeys(("state_size", "mamba_d_state", "ssm_state_size", "d_state"), 8),
    **dict.fromkeys(("mamba_d_ssm", "mamba_intermediate"), 2 * _HIDDEN),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads", "linear_num_value_heads"), 8),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim", "linear_key_head_dim", "linear_value_head_dim"), _HEAD_DIM),
    **dict.fromkeys(("linear_num_key_heads",), 4),
    **dict.fromkeys(("time_step_rank", "mamba_dt_rank"), 4),
    **dict.fromkeys(("chunk_size", "mamba_chunk_size", "mamba_chunk_length", "block_size"), 8),
    **dict.fromkeys(("sliding_window", "attention_chunk_size", "window_size"), 16),
    **dict.fromkeys(("attn_layer_period", "expert_layer_period"), 2),
    **dict.fromkeys(("attn_layer_offset", "expert_layer_offset"), 1),
    **dict.fromkeys(("rotary_dim",), 4),
    **dict.fromkeys(("hidden_size_per_layer_input",), 8),
    **dict.fromkeys(("vocab_size_per_layer_input",), 128),
}
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers")
_BY_LAYER = ("layer_types", "layers_block_type", "block_types", "mlp_layer_types", "attention_layers")
_DROPOUT = ("dropout", "drop", "pdrop", "jitter")
_MOST_LAYERS = 3


def tiny_config(config: PretrainedConfig, vocab_size: int = 128, **changed: Any) -> PretrainedConfig:
    """
    The configuration of a small model with the same kinds of layers, without dropout.

    Args:
        changed: settings that the family needs otherwise.
    """
    settings = config.to_dict()
    given = {key: value for key, value in settings.items() if key in _MOST and isinstance(value, int)}
    settings |= {key: min(value, _MOST[key]) for key, value in given.items() if not isinstance(value, bool)}
    settings |= _layers(settings)
    for key, value in settings.items():
        if isinstance(value, float) and any(word in key.lower() for word in _DROPOUT):
            settings[key] = 0.0
        elif key.endswith("_token_id") and isinstance(value, int):
            settings[key] = min(value, 2)
    settings |= {"vocab_size": vocab_size, "initializer_range": 0.2, "pad_token_id": 0, "torch_dtype": "float32"}
    settings.pop("quantization_config", None)
    return type(config).from_dict(settings | changed)


def tiny_model(config: PretrainedConfig, **more: Any) -> PreTrainedModel:
    """
    A causal language model of `tiny_config`; `more` goes to `from_config`. A family without
    `attn_implementation="sdpa"` has the attention of its own.
    """
    from transformers import AutoModelForCausalLM

    try:
        return AutoModelForCausalLM.from_config(copy.deepcopy(config), **more)
    except ValueError:
        if more.pop("attn_implementation", None) != "sdpa":
            raise
        return AutoModelForCausalLM.from_config(config, **more)


def _layers(settings: Mapping[str, Any]) -> dict[str, Any]:
    """A layer of each kind, two at least."""
    found: dict[str, Any] = {}
    number = 2
    for key in _BY_LAYER:
        kinds = settings.get(key)
        if isinstance(kinds, list) and kinds:
            distinct = list(dict.fromkeys(kinds))[:_MOST_LAYERS]
            number = max(number, len(distinct))
    for key in _BY_LAYER:
        kinds = settings.get(key)
        if isinstance(kinds, list) and kinds:
            distinct = list(dict.fromkeys(kinds))[:_MOST_LAYERS]
            found[key] = (distinct * number)[:number]
    return found | {key: number for key in _LAYERS if isinstance(settings.get(key), int)}


def family_config(name: str) -> PretrainedConfig | None:
    """The default configuration of a family of transformers, such as `qwen3`; None if `name` is none."""
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return AutoConfig.for_model(name) if name in CONFIG_MAPPING else None


def adapted(model: PreTrainedModel, tuning: str) -> nn.Module:
    """The model with a new adapter: `"full"` (none), `"lora"`, `"rslora"`, `"dora"` or `"ia3"`."""
    import peft

    if tuning == "full":
        return model
    if tuning == "ia3":
        linear = [name for name, module in model.named_modules() if type(module).__name__ in ("Linear", "Conv1D")]
        targets = [name for name in linear if name != "lm_head"]
        config: peft.PeftConfig = peft.IA3Config(task_type="CAUSAL_LM", target_modules=targets, feedforward_modules=[])
    else:
        options: dict[str, Any] = {"use_dora": tuning == "dora", "use_rslora": tuning == "rslora"}
        if any("mamba" in f"{name} {type(module).__name__}".lower() for name, module in model.named_modules()):
            options["exclude_modules"] = ["out_proj", "conv1d"]  # peft refuses them in Mamba
        config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear", **options)
    return peft.get_peft_model(model, config)
