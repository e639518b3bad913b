"""
Formulas for the memory of a process, in bytes.

Parameters, optimizer state and caches are counted exactly. Activations and the passes of probes, whose formulas are in
`gradients/footprint.py`, and formulas marked *estimate* were checked on a CPU only; they leave out fragmentation, the
CUDA context (about 0.5 GiB) and workspaces of kernels.
"""

from __future__ import annotations

from trl_entropy.preflight.shapes import ModelShape

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "auto": 2}
# Numbers that an optimizer keeps for each trainable parameter.
_OPTIMIZER_STATES = {"sgd": 0, "adafactor": 0, "lion": 1, "rmsprop": 1, "adagrad": 1}
# TRL's fused head computes one tile of logits at a time: so many tokens by vocabulary entries (trl 1.16).
HEAD_TOKENS, HEAD_ENTRIES = 4096, 32768
# Size of DeepSpeed's buffer for gradients (`reduce_bucket_size`), which the first backward pass allocates.
REDUCE_BUCKET = 500_000_000


def weights(shape: ModelShape, bytes_each: int, quantisation: str) -> int:
    """The base model without adapter. A quantised weight takes 1 byte, or 4 bits and 1/64 of a scale.

    Source: Dettmers et al. 2023 (arXiv 2305.14314), blocks of 64 with a float32 scale. The scales of 8-bit
    weights, one per row, are left out.
    """
    quantised_bytes = {"none": bytes_each, "8bit": 1.0, "4bit": 0.5 + 4 / 64}[quantisation]
    return int((shape.num_parameters - shape.num_quantised) * bytes_each + shape.num_quantised * quantised_bytes)


def shards(engine: str, what: str, world_size: int) -> int:
    """The number of processes among which `weights`, `gradients` or `optimizer` are divided.

    Source: Rajbhandari et al. 2020 (arXiv 1910.02054), figure 1: ZeRO-1 divides the optimizer, ZeRO-2 the gradients
    too, ZeRO-3 (and FSDP with full sharding) everything.
    """
    stages = {"optimizer": 1, "gradients": 2, "weights": 3}
    stage = 3 if engine.startswith("fsdp") else int(engine[-1]) if engine.startswith("zero") else 0
    return world_size if stage >= stages[what] else 1


def gradients(num_trainable: int, bytes_each: int, engine: str, world_size: int) -> int:
    """One number per trainable parameter, divided among the processes by ZeRO-2 and ZeRO-3."""
    return num_trainable * bytes_each // shards(engine, "gradients", world_size)


def communication(num_trainable: int, bytes_each: int, engine: str, has_gpu: bool) -> int:
    """Buffers for the communication of gradients: DDP's buckets hold a second copy. DeepSpeed's buffer has 5e8 numbers
    whatever is trained; on a CPU only the part that is used takes memory.
    """
    if engine == "ddp":
        return num_trainable * bytes_each
    if engine.startswith("zero"):
        return bytes_each * (REDUCE_BUCKET if has_gpu else min(REDUCE_BUCKET, num_trainable))
    return 0


def optimizer(num_trainable: int, bytes_each: int, optim: str, engine: str, world_size: int) -> int:
    """AdamW: two moments in the parameters' dtype; under ZeRO in float32, with a float32 master copy beside them.

    An optimizer that is not listed counts as AdamW; with `8bit` in its name it keeps one byte per number.
    """
    num_states = next((number for name, number in _OPTIMIZER_STATES.items() if name in optim), 2)
    if engine.startswith("zero"):
        return num_trainable * 4 * (num_states + 1) // shards(engine, "optimizer", world_size)
    state_bytes = 1 if "8bit" in optim else bytes_each
    return num_trainable * state_bytes * num_states // shards(engine, "optimizer", world_size)


def loss_head(shape: ModelShape, rows: int, completion_length: int, trains_head: bool) -> int:
    """TRL's fused language-model head: two float32 tiles of logits, and the head's float32 gradient if it is trained.

    The loss never holds the (rows, length, vocabulary) logits as a whole.
    """
    tile = min(rows * completion_length, HEAD_TOKENS) * min(shape.vocab_size, HEAD_ENTRIES) * 4
    return 2 * tile + (shape.vocab_size * shape.hidden_size * 4 if trains_head else 0)


def autocast_copies(shape: ModelShape, mixed: bool, bytes_each: int) -> int:
    """The bf16 copies of float32 Linear weights that autocast keeps during a forward pass."""
    return 2 * shape.num_quantised if mixed and bytes_each == 4 else 0


def kv_cache(shape: ModelShape, rows: int, length: int, bytes_each: int) -> int:
    """Keys and values of all tokens in all layers: 2 x layers x kv x rows x length numbers (transformers' cache)."""
    return 2 * shape.num_layers * shape.kv_size * rows * length * bytes_each


def generation_logits(shape: ModelShape, rows: int) -> int:
    """The logits of the last position, their float32 copy and their softmax: *estimate*, 3 x rows x vocabulary."""
    return 3 * rows * shape.vocab_size * 4


def float32_base(shape: ModelShape, bytes_each: int) -> int:
    """The float32 copy of frozen bf16 or fp16 parameters that exists while a probe scores in float32."""
    return 4 * num_frozen(shape) if bytes_each < 4 else 0


def largest(shape: ModelShape, trained: bool) -> int:
    """Numbers of the largest parameter that is trained, or that is not; 0 without any."""
    numbers = (param.numel() for param in shape.module.parameters() if param.requires_grad == trained)
    return max(numbers, default=0)


def bins(numbers: int) -> int:
    """What `magnitude_counts` holds: of each number |x|, its logarithm and twice its bin, and whether it is 0."""
    return 25 * min(numbers, 2**24)


def num_frozen(shape: ModelShape) -> int:
    """Parameters that are not trained."""
    return shape.num_parameters + shape.num_adapter - shape.num_trainable


def checkpoint(weight_bytes: int, num_trainable: int, bytes_each: int, has_adapter: bool, optimizer_bytes: int) -> int:
    """A checkpoint on disk: the model or only its adapter, and the optimizer's state of all processes."""
    return (num_trainable * bytes_each if has_adapter else weight_bytes) + optimizer_bytes
