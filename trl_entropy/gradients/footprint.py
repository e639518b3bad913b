"""
Formulas for the memory of a pass over completions, in bytes: what the size of a batch is planned by, and what
`trl-entropy doctor` says.

The coefficients are *estimates* for layers like Qwen2's and Llama's (RMSNorm, gated MLP), counted by torch's allocator
on a CPU in float32 (docs/results/diary.md has the measurement).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from trl_entropy.gradients.head_chunks import logits_at_once

# What a backward pass differentiates: nothing, log-probabilities of tokens alone, entropies (and those) as well, or
# both in two passes over one graph.
Differentiated = Literal["", "logps", "entropies", "twice"]
# Tensors of the size of a chunk's logits that are alive together, by order of the derivative; and in a backward pass.
_LOGITS = (4, 10, 20)
_LOGITS_BACKWARD = {"logps": 4, "entropies": 5, "twice": 6}
# Numbers per token in a layer's MLP, as multiples of its inner and outer size, without and with derivatives.
_MLP, _MLP_DERIVED = (4, 4.5), (4, 6)
# The same of attention on torch's math backend, which alone has derivatives: heads x length, and the outer size.
_ATTENTION_DERIVED = (2.75, 8.5)


@dataclass(frozen=True)
class LayerSizes:
    """
    The sizes of a language model on which the memory of a pass depends.

    Attributes:
        intermediate_size: of a token in one layer's MLP; with experts, of those that compute a token.
        kv_size: size of a token's key in one layer.
    """

    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    kv_size: int
    vocab_size: int

    @classmethod
    def of(cls, config: Any) -> LayerSizes:
        """From the configuration of a text model of transformers."""
        # A model without attention, such as Mamba, has no heads
        heads, hidden = getattr(config, "num_attention_heads", None) or 1, config.hidden_size
        head_size = getattr(config, "head_dim", None) or hidden // heads
        inner = getattr(config, "intermediate_size", None) or 4 * hidden
        expert = getattr(config, "moe_intermediate_size", None) or inner
        return cls(
            num_layers=config.num_hidden_layers,
            hidden_size=hidden,
            intermediate_size=max(inner, expert * (getattr(config, "num_experts_per_tok", None) or 1)),
            num_heads=heads,
            kv_size=head_size * (getattr(config, "num_key_value_heads", None) or heads),
            vocab_size=config.vocab_size,
        )


@dataclass(frozen=True)
class Pass:
    """
    A pass of the float32 model over completions.

    Attributes:
        length, completion_length: columns of the longest row, and those of its completion.
        order: derivatives in forward mode.
        backward: what a graph is kept for; empty without a backward pass.
        on_cpu: the logits of a chunk are fewer there.
        in_chunks: whether the head is applied to some columns after the others.
        attention: its implementation in transformers.
        trains_head: whether a backward pass has the head's gradient of each completion too: T (V + h) or V h numbers,
            whichever are fewer.
    """

    sizes: LayerSizes
    length: int
    completion_length: int
    order: int = 0
    backward: Differentiated = ""
    on_cpu: bool = True
    in_chunks: bool = True
    attention: str = "sdpa"
    trains_head: bool = False

    def num_bytes(self, rows: int) -> int:
        """
        Of `rows` completions at a time, without the model. A layer's MLP, its attention and the head follow one
        another, so the largest counts. Forward mode carries 2^order times as much, a graph what `activations` says.
        """
        sizes, tokens = self.sizes, rows * self.length
        head = 4 * _LOGITS_BACKWARD.get(self.backward, _LOGITS[self.order]) * self.num_logits(rows)
        if self.backward:
            kept = activations(sizes, rows, self.length, False, 4, self.attention, checkpointing=False)
            return kept + head + 4 * rows * self._head_gradient
        inner, outer = _MLP_DERIVED if self.order else _MLP
        layer = tokens * (inner * sizes.intermediate_size + outer * sizes.hidden_size)
        if self.order:
            per_head, outer = _ATTENTION_DERIVED
            layer = max(layer, tokens * (per_head * sizes.num_heads * self.length + outer * sizes.hidden_size))
        body = 4 * 2**self.order
        return int(max(body * layer, head + body * tokens * sizes.hidden_size))

    @property
    def _head_gradient(self) -> int:
        vocabulary, hidden = self.sizes.vocab_size, self.sizes.hidden_size
        return min(self.completion_length * (vocabulary + hidden), vocabulary * hidden) if self.trains_head else 0

    def num_logits(self, rows: int) -> int:
        """Logits that exist at a time, one tensor of them."""
        whole = rows * (self.completion_length + 1)
        if self.in_chunks:
            columns = max(1, logits_at_once(self.on_cpu) // (rows * self.sizes.vocab_size))
            whole = min(whole, rows * columns)
        return whole * self.sizes.vocab_size


def activations(
    sizes: LayerSizes, rows: int, length: int, mixed: bool, bytes_each: int, attention: str, checkpointing: bool
) -> int:
    """What the backbone keeps for backward: *estimate* for layers like Qwen2's and Llama's (RMSNorm, gated MLP).

    A layer keeps 10 h + 4 kv + 4 f numbers per token, and heads x L more with eager attention. With checkpointing it
    keeps its input (h), and one layer at a time is recomputed in full. Under autocast the residual stream and the
    norms (10 h) stay float32. The form is that of Korthikanti et al. 2022 (arXiv 2205.05198), section 4; the
    coefficients were counted in transformers 5.23. For tiny models on a CPU it is within a factor of 1.3 of the
    tensors that autograd saves.
    """
    wide, narrow = (4, 2) if mixed else (bytes_each, bytes_each)
    inner = 4 * sizes.kv_size + 4 * sizes.intermediate_size
    inner += sizes.num_heads * length if attention == "eager" else 0
    layer = 10 * sizes.hidden_size * wide + inner * narrow
    if checkpointing:
        return rows * length * (sizes.num_layers * sizes.hidden_size * wide + layer)
    return rows * length * sizes.num_layers * layer


def rows_that_fit(one_pass: Pass, budget: float, most: int) -> int:
    """Completions at a time: `most` halved until the pass needs at most `budget` bytes, at least one."""
    rows = max(1, most)
    while rows > 1 and one_pass.num_bytes(rows) > budget:
        rows //= 2
    return rows
