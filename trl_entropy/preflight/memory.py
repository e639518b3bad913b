"""
Formulas of a process's memory, in bytes. Counts (parameters, optimizer, caches) are exact; what is marked *estimate*
(activations, the probes' scoring) was checked on a CPU only, and leaves out the allocator's fragmentation, CUDA's own
context (about 0.5 GiB) and kernels' workspaces.
"""

from __future__ import annotations

from trl_entropy.preflight.shapes import ModelShape

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "auto": 2}
# Numbers that an optimizer keeps for each trainable parameter, and bytes of each.
_OPTIMIZER_STATES = {"sgd": 0, "adafactor": 0, "lion": 1, "rmsprop": 1, "adagrad": 1}
# TRL's fused head: tokens and vocabulary entries of the tile of logits that exists at a time (trl 1.16).
HEAD_TOKENS, HEAD_ENTRIES = 4096, 32768
# Numbers of DeepSpeed's buffer for gradients on their way (`reduce_bucket_size`), allocated at the first backward.
REDUCE_BUCKET = 500_000_000


def weights(shape: ModelShape, bytes_each: int, quantisation: str) -> int:
    """Base model without adapter: D numbers; quantised Linear layers take 1 byte, or 4 bits and a scale for each 64.

    Source: Dettmers et al. 2023 (arXiv 2305.14314), blocks of 64 with a float32 scale; the scales of 8 bits (one a
    row) are left out.
    """
    quantised_bytes = {"none": bytes_each, "8bit": 1.0, "4bit": 0.5 + 4 / 64}[quantisation]
    return int((shape.num_parameters - shape.num_quantised) * bytes_each + shape.num_quantised * quantised_bytes)


def shards(engine: str, what: str, world_size: int) -> int:
    """Number of processes that `weights`, `gradients` or `optimizer` are divided among.

    Source: Rajbhandari et al. 2020 (arXiv 1910.02054), figure 1: ZeRO-1 divides the optimizer, ZeRO-2 the gradients
    too, ZeRO-3 (and FSDP with full sharding) everything.
    """
    stages = {"optimizer": 1, "gradients": 2, "weights": 3}
    stage = 3 if engine == "fsdp" else int(engine[-1]) if engine.startswith("zero") else 0
    return world_size if stage >= stages[what] else 1


def gradients(num_trainable: int, bytes_each: int, engine: str, world_size: int) -> int:
    """One number a trainable parameter, divided among processes from ZeRO-2 on."""
    return num_trainable * bytes_each // shards(engine, "gradients", world_size)


def communication(num_trainable: int, bytes_each: int, engine: str, has_gpu: bool) -> int:
    """Buffers that gradients travel in: DDP's buckets hold a second copy; DeepSpeed's has 5e8 numbers whatever is
    trained (on a CPU only the part that is written to counts).
    """
    if engine == "ddp":
        return num_trainable * bytes_each
    if engine.startswith("zero"):
        return bytes_each * (REDUCE_BUCKET if has_gpu else min(REDUCE_BUCKET, num_trainable))
    return 0


def optimizer(num_trainable: int, bytes_each: int, optim: str, engine: str, world_size: int) -> int:
    """AdamW: two moments in the parameters' dtype; under ZeRO in float32, with a float32 master copy beside them.

    An optimizer that is not listed counts as AdamW; those whose name has `8bit` keep a byte a number.
    """
    num_states = next((number for name, number in _OPTIMIZER_STATES.items() if name in optim), 2)
    if engine.startswith("zero"):
        return num_trainable * 4 * (num_states + 1) // shards(engine, "optimizer", world_size)
    state_bytes = 1 if "8bit" in optim else bytes_each
    return num_trainable * state_bytes * num_states // shards(engine, "optimizer", world_size)


def activations(
    shape: ModelShape, rows: int, length: int, mixed: bool, bytes_each: int, attention: str, checkpointing: bool
) -> int:
    """What the backbone keeps for backward: *estimate* for layers like Qwen2's and Llama's (RMSNorm, gated MLP).

    A token of a layer: 10 h + 4 kv + 4 f numbers, and heads x L of them with eager attention. With checkpointing h for
    each layer's input, and one layer as it is recomputed. Under autocast the residual stream and the norms (10 h) stay
    float32. Form: Korthikanti et al. 2022 (arXiv 2205.05198), section 4; coefficients: counted in transformers 5.23.
    Against the tensors that autograd saves in tiny models on a CPU: within a factor of 1.3.
    """
    wide, narrow = (4, 2) if mixed else (bytes_each, bytes_each)
    inner = 4 * shape.kv_size + 4 * shape.intermediate_size
    inner += shape.num_heads * length if attention == "eager" else 0
    layer = 10 * shape.hidden_size * wide + inner * narrow
    if checkpointing:
        return rows * length * (shape.num_layers * shape.hidden_size * wide + layer)
    return rows * length * shape.num_layers * layer


def loss_head(shape: ModelShape, rows: int, completion_length: int, trains_head: bool) -> int:
    """TRL's fused language-model head: two float32 tiles of logits, and the head's float32 gradient if it is trained.

    The whole (rows, length, vocabulary) logits never exist in the loss.
    """
    tile = min(rows * completion_length, HEAD_TOKENS) * min(shape.vocab_size, HEAD_ENTRIES) * 4
    return 2 * tile + (shape.vocab_size * shape.hidden_size * 4 if trains_head else 0)


def autocast_copies(shape: ModelShape, mixed: bool, bytes_each: int) -> int:
    """bf16 copies of float32 Linear weights that autocast keeps during a forward pass: 2 bytes a number."""
    return 2 * shape.num_quantised if mixed and bytes_each == 4 else 0


def kv_cache(shape: ModelShape, rows: int, length: int, bytes_each: int) -> int:
    """Key and value of every token in every layer: 2 x layers x kv x rows x length numbers (transformers' cache)."""
    return 2 * shape.num_layers * shape.kv_size * rows * length * bytes_each


def generation_logits(shape: ModelShape, rows: int) -> int:
    """Logits of the last position, their float32 copy and the softmax that is sampled from: *estimate*, three times
    rows x vocabulary float32."""
    return 3 * rows * shape.vocab_size * 4


def scoring(shape: ModelShape, rows: int, length: int, completion_length: int, order: int) -> int:
    """A probe's forward pass over `rows` completions in float32, without a graph: *estimate*.

    The largest of three, which do not exist at the same time: five tensors of the size of all completion tokens'
    logits (logits, log-probabilities, probabilities, their product); the layer's 4 f + 4 h numbers a token; where
    derivatives are taken, four tensors of attention weights (heads x L x L). Times the 2^order tensors that forward
    mode carries. Against the tensors alive in tiny models on a CPU: within a factor of 1.5.
    """
    logits = 5 * rows * completion_length * shape.vocab_size
    layer = 4 * rows * length * (shape.intermediate_size + shape.hidden_size)
    attention = 4 * rows * shape.num_heads * length**2 if order else 0
    return 4 * 2**order * max(logits, layer, attention)


def float32_base(shape: ModelShape, bytes_each: int) -> int:
    """Float32 copy of frozen parameters of a narrower dtype, while a probe scores in float32."""
    num_frozen = shape.num_parameters + shape.num_adapter - shape.num_trainable
    return 4 * num_frozen if bytes_each < 4 else 0


def checkpoint(weight_bytes: int, num_trainable: int, bytes_each: int, has_adapter: bool, optimizer_bytes: int) -> int:
    """A checkpoint's size on disk: the model, or its adapter alone, and the optimizer's state of all processes."""
    return (num_trainable * bytes_each if has_adapter else weight_bytes) + optimizer_bytes
