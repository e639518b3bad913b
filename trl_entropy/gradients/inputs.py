"""What a model is called with to score completions, so that its scores do not depend on how the rows are padded."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

from torch import nn

from trl_entropy.rollouts.completions import Completions


def model_inputs(model: nn.Module, completions: Completions) -> dict[str, Any]:
    """
    Keywords of the model's forward that give the logits before and at every completion token, (B, T + 1, V).

    Positions are given to a model that would count the columns of the batch instead: columns without a token are
    left out before scoring, and training counts those that it has.
    """
    width = completions.completion_mask.shape[1]
    inputs: dict[str, Any] = {
        "input_ids": completions.input_ids,
        "attention_mask": completions.attention_mask,
        "use_cache": False,
        "logits_to_keep": width + 1,
        **completions.column_types,
    }
    if completions.pixel_inputs is not None:
        inputs |= completions.pixel_inputs.keywords()
    return inputs | ({"position_ids": completions.position_ids} if counts_columns(model) else {})


def counts_columns(model: nn.Module) -> bool:
    """
    Whether the model has learned a vector for each position and, unless it is told the positions, takes the number of
    the column, padding included, as GPT-2 does. OPT does not: it counts the tokens of the attention mask.
    """
    base = base_model(model)
    if "position_ids" not in inspect.signature(type(base).forward).parameters:
        return False
    return any(_is_table_of_positions(name, module) for name, module in base.named_modules())


def base_model(model: nn.Module) -> Any:
    """The model of transformers inside an adapter of peft, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _is_table_of_positions(name: str, module: nn.Module) -> bool:
    parts = name.lower().split(".")
    sees = any("vis" in part or "audio" in part for part in parts)  # positions of an image's patches, not of tokens
    return type(module) is nn.Embedding and not sees and any(part == "wpe" or "position" in part for part in parts)


@contextlib.contextmanager
def eager_experts(model: nn.Module) -> Iterator[None]:
    """
    A mixture of experts computes one expert after the other inside: the kernels of all experts at once, such as
    `_grouped_mm`, have no forward-mode derivative.
    """
    base = base_model(model)
    kept = base.get_experts_implementation() if hasattr(base, "get_experts_implementation") else {}
    if set(kept.values()) <= {"eager", None}:
        yield
        return
    base.set_experts_implementation("eager")
    try:
        yield
    finally:
        base.set_experts_implementation(kept)
