"""
What a pass through the model has to do: FLOPs of its matrix products, and bytes that everything else moves through the
device's memory.

FLOPs are counted as `torch.utils.flop_counter` counts them, 2 for a multiplication with its addition. A model's layers
take 2 N of them per token in a forward pass, N the entries of their matrices (Kaplan et al. 2020, arXiv 2001.08361,
section 2.1); attention and the language-model head are counted apart. A test compares both with what torch does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from torch import nn

from trl_entropy.preflight.hardware import SHARE_OF_PEAK, Rates

if TYPE_CHECKING:
    from trl_entropy.preflight.shapes import ModelShape


@dataclass(frozen=True)
class Work:
    """
    What one process does: FLOPs by precision (`float32`, `tf32`, `bfloat16`), and bytes.

    Attributes:
        memory: bytes read from and written to the device's memory, those of matrix products left out.
        link: bytes that a process sends to others of its machine.
        network: bytes that the machine sends to other machines.
    """

    flops: Mapping[str, float] = field(default_factory=dict)
    memory: float = 0.0
    link: float = 0.0
    network: float = 0.0

    def __add__(self, other: Work) -> Work:
        names = dict.fromkeys([*self.flops, *other.flops])
        flops = {name: self.flops.get(name, 0.0) + other.flops.get(name, 0.0) for name in names}
        sums = (getattr(self, name) + getattr(other, name) for name in ("memory", "link", "network"))
        return Work(flops, *sums)

    def __rmul__(self, number: float) -> Work:
        flops = {name: number * value for name, value in self.flops.items()}
        return Work(flops, number * self.memory, number * self.link, number * self.network)

    def seconds(self, rates: Rates, share: float = SHARE_OF_PEAK) -> float:
        """The time at `share` of each peak rate, one kind of work after the other: nothing overlaps."""
        products = sum(number / getattr(rates, precision) for precision, number in self.flops.items())
        moved = self.memory / rates.memory + self.link / rates.link + self.network / rates.network
        return (products + moved) / share


class Traffic(NamedTuple):
    """
    Bytes that operations other than matrix products read and write: for each token in each layer, per number of the
    hidden state, the MLP's and a key's size, of attention weights (heads x length) and of what adapters add to; and
    per logit.

    Counted on a CPU in transformers 5.23, kernel by kernel without fusion: Qwen2's layers (RMSNorm, gated MLP).
    """

    hidden: float
    intermediate: float
    kv: float
    weights: float
    adapted: float
    logits: float


# Forward passes in bf16 (with TRL's fused head, whose tiles are written and read once) and in float32 by order of the
# derivative, where attention with a derivative keeps its weights; and forward and backward together.
FORWARD = {
    "bfloat16": (Traffic(105, 10, 20, 0, 10, 8),),
    "float32": (
        Traffic(121, 20, 41, 0, 20, 36),
        Traffic(555, 93, 196, 112, 69, 185),
        Traffic(1807, 591, 659, 394, 215, 670),
    ),
}
BACKWARD = {"bfloat16": Traffic(248, 18, 37, 0, 7, 24), "float32": Traffic(313, 36, 76, 0, 15, 100)}


@dataclass(frozen=True)
class Model:
    """
    The sizes of a model that its work depends on, in numbers of one float each.

    Attributes:
        body: entries of all matrices but embeddings and head; of them `trained` are trained.
        head: entries of the language-model head, hidden size x vocabulary.
        attention: size of the queries, keys and values that attend, layers x heads x size of a head.
        sizes: what `Traffic` is multiplied with for a token, in all layers together: hidden states, the MLP's and the
            keys' sizes, attention weights for each token of context, and outputs that an adapter adds to.
    """

    body: int
    trained: int
    head: int
    head_is_trained: bool
    attention: int
    sizes: tuple[int, int, int, int, int]
    vocab_size: int

    @classmethod
    def of(cls, shape: ModelShape) -> Model | None:
        """None where the number of products depends on the tokens: a mixture of experts."""
        if any(param.ndim > 2 for param in shape.module.parameters()):
            return None
        model = shape.module
        head = model.get_output_embeddings()  # type: ignore[operator]
        tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
        tables.add(id(head.weight))
        matrices = [param for param in model.parameters() if param.ndim == 2 and id(param) not in tables]
        layers, config = shape.num_layers, model.config.get_text_config()  # type: ignore[union-attr, operator]
        head_size = getattr(config, "head_dim", None) or shape.hidden_size // shape.num_heads
        adapted = sum(p.shape[0] for name, p in model.named_parameters() if ".lora_B." in name)
        sizes = (shape.hidden_size, shape.intermediate_size, shape.kv_size, shape.num_heads)
        return cls(
            body=sum(param.numel() for param in matrices),
            trained=sum(param.numel() for param in matrices if param.requires_grad),
            head=shape.hidden_size * shape.vocab_size,
            head_is_trained=bool(head.weight.requires_grad),
            attention=layers * shape.num_heads * head_size,
            sizes=(*(layers * size for size in sizes), adapted),  # type: ignore[arg-type]
            vocab_size=shape.vocab_size,
        )

    # ---- passes over whole completions

    def forward(self, rows: float, length: int, scored: int, precision: str, order: int = 0) -> Work:
        """
        A forward pass over `rows` sequences of `length` tokens with the logits of `scored` of them, and its `order`
        derivatives in forward mode.

        An order takes three times the products of the one below it where both factors move, and twice where one is
        frozen (`gradients/frozen_layers.py`). The first layer's queries, keys and values, whose input has no tangent
        under LoRA, are counted like the rest.
        """
        moving = 2 * length * self.trained + 4 * length**2 * self.attention
        frozen = 2 * length * (self.body - self.trained)
        head = 2 * scored * self.head * (3 if self.head_is_trained else 2) ** order
        flops = rows * (3**order * moving + 2**order * frozen + head)
        return Work({precision: flops}, self._traffic(FORWARD[_dtype(precision)][order], rows, length, scored))

    def backward(
        self,
        rows: float,
        length: int,
        scored: int,
        precision: str,
        num: int = 1,
        weights: bool = True,
        keeps_logits: bool = False,
    ) -> Work:
        """
        What `num` backward passes add to a forward pass: gradients of all activations and, if `weights`, of the
        trained matrices; and the logits once more, which are not kept when they are many.
        """
        inputs = 2 * rows * length * self.body + 8 * rows * length**2 * self.attention
        of_weights = 2 * rows * length * self.trained if weights else 0
        head = (2 - keeps_logits + self.head_is_trained * weights) * 2 * rows * scored * self.head
        traffic = self._traffic(BACKWARD[_dtype(precision)], rows, length, scored)
        return num * Work({precision: inputs + of_weights + head}, traffic)

    def layers_again(self, rows: float, length: int, precision: str) -> Work:
        """The forward pass of the layers that gradient checkpointing repeats; the head is not among them."""
        return self.forward(rows, length, 0, precision)

    # ---- generation

    def prefill(self, rows: float, length: int, precision: str) -> Work:
        """The prompts' keys and values, and the logits of their last token."""
        return self.forward(rows, length, 1, precision)

    def decoding(
        self, rows: int, prompt: int, new: int, precision: str, weight_bytes: int, cache_bytes: float, logit_bytes: int
    ) -> Work:
        """
        `new` tokens of `rows` completions, one after the other: each reads all weights and the whole cache.

        Args:
            weight_bytes: of all parameters.
            cache_bytes: read and written for a token of context of one completion.
            logit_bytes: read and written for each logit when a token is drawn.
        """
        tokens, context = rows * new, rows * (new * prompt + new * (new - 1) / 2)
        flops = 2 * tokens * (self.body + self.head) + 4 * context * self.attention
        layers = self._traffic(FORWARD[_dtype(precision)][0], tokens, 1, 0)
        moved = new * weight_bytes + context * cache_bytes + tokens * self.vocab_size * logit_bytes
        return Work({precision: flops}, layers + moved)

    # ---- parts

    def _traffic(self, each: Traffic, rows: float, length: int, scored: int) -> float:
        hidden, intermediate, kv, heads, adapted = self.sizes
        sizes = (hidden, intermediate, kv, heads * length, adapted)
        token = sum(number * size for number, size in zip(each[:5], sizes, strict=True))
        return rows * (length * token + scored * self.vocab_size * each.logits)


def _dtype(precision: str) -> str:
    """The dtype of numbers in memory: TF32 is a way to multiply float32 numbers."""
    return "bfloat16" if precision == "bfloat16" else "float32"
