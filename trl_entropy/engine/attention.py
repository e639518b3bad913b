"""Attention that computes in float32 and has derivatives, while a probe scores."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

# Kernels of attention that compute in float32, in which probes score, and have derivatives in forward mode.
SCORED_ATTENTION = ("eager", "sdpa")


def attention_of(model: nn.Module) -> dict[int, Any]:
    """By `id`, the configurations of the model's parts, those of its images included, that name another kernel."""
    configs = {id(one): one for one in (getattr(module, "config", None) for module in model.modules())}
    names = {key: getattr(one, "_attn_implementation", None) for key, one in configs.items()}
    return {key: configs[key] for key, name in names.items() if isinstance(name, str) and name not in SCORED_ATTENTION}


def can_switch_attention(model: nn.Module) -> bool:
    """Whether the model asks its configuration for the kernel at each call, as nearly all of transformers do."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return hasattr(base, "_can_set_attn_implementation") and base._can_set_attn_implementation()


@contextmanager
def scored_attention(model: nn.Module) -> Iterator[None]:
    """
    Lets a model that trains with `flash_attention_2`, `flex_attention` or a kernel from the hub compute with torch's
    `scaled_dot_product_attention`, or `eager` where it has not got that. What it had is back afterwards, always.

    Not by `set_attn_implementation`, which would look for the kernel's package again to put it back. Written against
    transformers 5.23: `_attn_implementation_internal` of a configuration is what its layers look up.
    """
    others = attention_of(model) if can_switch_attention(model) else {}
    kept = [(config, config._attn_implementation) for config in others.values()]
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    name = "sdpa" if getattr(base, "_supports_sdpa", True) else "eager"
    try:
        for config, _ in kept:
            config._attn_implementation_internal = name
        yield
    finally:
        for config, kernel in kept:
            config._attn_implementation_internal = kernel
