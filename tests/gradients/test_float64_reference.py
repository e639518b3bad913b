"""The float64 reference is float64 throughout, equals a plain reimplementation, and leaves no trace."""

import copy
import warnings

import pytest
import torch
from only_float64 import assert_only_float64
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM
from trl.trainer.utils import add_fused_lm_head

from trl_entropy.engine.strict_float32 import fp32_strict
from trl_entropy.gradients.float64_reference import float64_reference

VOCAB = 61
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    # Ten times the default, so that attention and the MLP are far from linear
    "initializer_range": 0.2,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN_ROPE = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 16}


def qwen2(**overrides) -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(**SIZES | {"tie_word_embeddings": True} | overrides))
    return off_init(model)


def llama(**overrides) -> LlamaForCausalLM:
    torch.manual_seed(1)
    return off_init(LlamaForCausalLM(LlamaConfig(**SIZES | overrides)))


def off_init(model):
    """Moves biases off zero and norms off one, where a mistake in them would not show."""
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or "norm" in name:
            parameter.data += 0.3 * torch.randn_like(parameter)
    return model


def lora(model, **overrides):
    config = {"r": 4, "lora_alpha": 12, "lora_dropout": 0.0, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    model = get_peft_model(model, LoraConfig(**config | overrides))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1)
    return model


MODELS = {
    "qwen2": qwen2,
    "qwen2-eager": lambda: qwen2(attn_implementation="eager"),
    "qwen2-untied": lambda: qwen2(tie_word_embeddings=False),
    "qwen2-lora": lambda: lora(qwen2()),
    "qwen2-lora-bias": lambda: lora(qwen2(), lora_bias=True, use_rslora=True, target_modules=["q_proj", "v_proj"]),
    "llama": llama,
    "llama-biases": lambda: llama(attention_bias=True, mlp_bias=True, head_dim=16),
    "llama-llama3-rope": lambda: llama(rope_parameters=LLAMA3_ROPE),
    "llama-yarn-rope": lambda: llama(rope_parameters=YARN_ROPE),
    "llama-lora": lambda: lora(llama(attn_implementation="eager")),
}
each_model = pytest.mark.parametrize("build", MODELS.values(), ids=MODELS.keys())


def batch(num_tokens: int = 9) -> tuple[torch.Tensor, torch.Tensor]:
    """Three sequences, left-padded by 4, 0 and 1 tokens."""
    input_ids = torch.randint(0, VOCAB, (3, num_tokens), generator=torch.Generator().manual_seed(2))
    attention_mask = torch.ones_like(input_ids)
    attention_mask[0, :4] = 0
    attention_mask[2, :1] = 0
    return input_ids, attention_mask


def entropy_sum(model) -> torch.Tensor:
    input_ids, attention_mask = batch()
    logps = model(input_ids=input_ids, attention_mask=attention_mask).logits.log_softmax(-1)
    return -((logps.exp() * logps).sum(-1) * attention_mask).sum()


def trainable(model) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def causal_lm(model):
    return model.get_base_model() if hasattr(model, "get_base_model") else model


# --- It is float64 ---------------------------------------------------------------------------------------------------


@each_model
def test_no_lower_float_in_forward_backward_and_hessian_vector_product(build):
    model = build()
    with float64_reference(model), assert_only_float64():
        loss = entropy_sum(model)
        gradients = torch.autograd.grad(loss, trainable(model), create_graph=True)
        products = torch.autograd.grad(sum((g * g).sum() for g in gradients), trainable(model))
    assert loss.dtype == torch.float64
    assert all(t.dtype == torch.float64 and t.isfinite().all() for t in (*gradients, *products))
    assert any(t.abs().sum() > 0 for t in products)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_model_of_any_float_dtype_is_float64_inside(dtype):
    model = lora(llama()).to(dtype)
    before = snapshot(model)
    with float64_reference(model), assert_only_float64():
        assert entropy_sum(model).dtype == torch.float64
    assert_unchanged(model, before)


def test_guard_catches_the_plain_double_model():
    with assert_only_float64(), pytest.raises(AssertionError, match=r"touched a torch\.float32 tensor"):
        entropy_sum(qwen2().double())


def test_guard_catches_backward_and_recomputation():
    class ThroughFloat32(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad.float().double()

    x = torch.ones(3, dtype=torch.float64, requires_grad=True)
    with assert_only_float64():
        y = ThroughFloat32.apply(x).sum()
        with pytest.raises(AssertionError, match="float32"):
            y.backward()


def plain_weights(model) -> dict[str, torch.Tensor]:
    """Float64 weights by the plain model's names, with LoRA merged: W + scaling B A."""
    weights = {name: tensor.double() for name, tensor in causal_lm(model).state_dict().items()}
    for name in [name for name in weights if ".lora_A." in name]:
        layer = name.split(".lora_A.")[0]
        scaling = causal_lm(model).get_submodule(layer).scaling["default"]
        up, down = weights[f"{layer}.lora_B.default.weight"], weights[name]
        weights[f"{layer}.base_layer.weight"] += scaling * up @ down
        if f"{layer}.lora_B.default.bias" in weights:
            weights[f"{layer}.base_layer.bias"] += scaling * weights[f"{layer}.lora_B.default.bias"]
    return {name.replace(".base_layer", ""): tensor for name, tensor in weights.items()}


def plain_logits(weights, config, inv_freq, rope_scale, input_ids, attention_mask) -> torch.Tensor:
    """A decoder written from the papers, position by position in attention: no transformers, no SDPA."""
    heads, key_heads = config.num_attention_heads, config.num_key_value_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    num_sequences, num_tokens = input_ids.shape

    def linear(x, name):
        return F.linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))

    def norm(x, name):
        return x / (x.square().mean(-1, keepdim=True) + config.rms_norm_eps).sqrt() * weights[f"{name}.weight"]

    angle = torch.arange(num_tokens, dtype=torch.float64)[:, None] * inv_freq
    rotation = torch.polar(torch.full_like(angle, rope_scale), angle)

    def heads_of(x, count):
        return x.view(num_sequences, num_tokens, count, size)

    def rotate(x):  # the pair (i, i + size / 2) is one complex number
        first, second = x.chunk(2, dim=-1)
        turned = torch.complex(first, second) * rotation[:, None]
        return torch.cat((turned.real, turned.imag), dim=-1)

    hidden = weights["model.embed_tokens.weight"][input_ids]
    for layer in (f"model.layers.{i}" for i in range(config.num_hidden_layers)):
        x = norm(hidden, f"{layer}.input_layernorm")
        query = rotate(heads_of(linear(x, f"{layer}.self_attn.q_proj"), heads))
        key = rotate(heads_of(linear(x, f"{layer}.self_attn.k_proj"), key_heads))
        value = heads_of(linear(x, f"{layer}.self_attn.v_proj"), key_heads)
        out = torch.zeros_like(query)
        for b in range(num_sequences):
            for t in range(num_tokens):
                seen = attention_mask[b, : t + 1].bool()
                for head in range(heads) if seen.any() else ():
                    shared = head // (heads // key_heads)
                    scores = key[b, : t + 1, shared][seen] @ query[b, t, head] / size**0.5
                    out[b, t, head] = scores.softmax(0) @ value[b, : t + 1, shared][seen]
        hidden = hidden + linear(out.flatten(2), f"{layer}.self_attn.o_proj")
        x = norm(hidden, f"{layer}.post_attention_layernorm")
        gate = linear(x, f"{layer}.mlp.gate_proj")
        hidden = hidden + linear(gate * gate.sigmoid() * linear(x, f"{layer}.mlp.up_proj"), f"{layer}.mlp.down_proj")
    return linear(norm(hidden, "model.norm"), "lm_head")


@each_model
def test_logits_equal_a_plain_float64_reimplementation(build):
    model = build()
    input_ids, attention_mask = batch()
    rotary = causal_lm(model).model.rotary_emb
    rope = (rotary.inv_freq.double(), rotary.attention_scaling)
    expected = plain_logits(plain_weights(model), model.config, *rope, input_ids, attention_mask)
    with torch.no_grad(), float64_reference(model):
        logits = model(input_ids=input_ids, attention_mask=attention_mask).logits
    assert logits.abs().max() > 1
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-12)


def test_rotary_frequencies_are_those_of_the_paper_in_float32():
    """The reimplementation takes `inv_freq` as given, so it is checked here."""
    exponent = torch.arange(0, 8, 2, dtype=torch.float64) / 8
    paper = 10_000.0**-exponent
    torch.testing.assert_close(qwen2().model.rotary_emb.inv_freq.double(), paper, rtol=1e-6, atol=0)


def test_left_padding_does_not_change_the_logits():
    model = qwen2()
    input_ids, attention_mask = batch()
    with torch.no_grad(), float64_reference(model):
        padded = model(input_ids=input_ids, attention_mask=attention_mask).logits[0, 4:]
        alone = model(input_ids=input_ids[:1, 4:], attention_mask=attention_mask[:1, 4:]).logits[0]
    torch.testing.assert_close(padded, alone, rtol=0, atol=1e-12)


def taylor_remainders(model, steps) -> torch.Tensor:
    """|f(theta + step v) - f(theta) - step <grad f, v>| relative to |f(theta)|."""
    parameters = trainable(model)
    generator = torch.Generator().manual_seed(3)
    direction = [torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in parameters]
    loss = entropy_sum(model)
    slope = sum((g * v).sum() for g, v in zip(torch.autograd.grad(loss, parameters), direction, strict=True)).item()
    remainders, moved = [], 0.0
    start = [p.detach().clone() for p in parameters]
    with torch.no_grad():
        for moved in steps:
            for p, p0, v in zip(parameters, start, direction, strict=True):
                p.copy_(p0 + moved * v)
            remainders.append(abs(entropy_sum(model).item() - loss.item() - moved * slope) / abs(loss.item()))
    return torch.tensor(remainders, dtype=torch.float64)


# 1e-4 ... 1e-7: below, the rounding of the loss itself, 1e-16 of it, is no longer small beside step^2
STEPS = torch.logspace(-4, -7, 7, dtype=torch.float64).tolist()


def log_slopes(remainders: torch.Tensor) -> torch.Tensor:
    return remainders.log10().diff() / torch.tensor(STEPS, dtype=torch.float64).log10().diff()


@pytest.mark.parametrize("build", [qwen2, MODELS["llama-lora"]], ids=["qwen2", "llama-lora"])
def test_taylor_remainder_falls_as_the_square_of_the_step(build):
    model = build()
    with float64_reference(model):
        remainders = taylor_remainders(model, STEPS)
    torch.testing.assert_close(log_slopes(remainders), torch.full((6,), 2.0, dtype=torch.float64), rtol=0, atol=0.1)


def test_plain_double_fails_the_taylor_test():
    """Why the mode exists: in `.double()` the float32 inside leaves a floor under the remainder."""
    remainders = taylor_remainders(qwen2().double(), STEPS)
    assert (log_slopes(remainders) - 2).abs().max() > 0.5
    with float64_reference(model := qwen2()):
        clean = taylor_remainders(model, STEPS)
    assert remainders[-1] > 1e3 * clean[-1]


def test_autocast_around_the_block_changes_nothing():
    model = qwen2()
    with float64_reference(model):
        expected = entropy_sum(model)
    with torch.autocast("cpu", torch.bfloat16):
        with float64_reference(model), assert_only_float64():
            assert not torch.is_autocast_enabled("cpu")
            assert torch.equal(entropy_sum(model), expected)
        assert torch.is_autocast_enabled("cpu")


# --- It leaves no trace ----------------------------------------------------------------------------------------------


def snapshot(model) -> dict:
    """Everything reachable from the modules, by identity and by bits, and the process-wide switches."""
    return {
        "attributes": [(module, list(vars(module).items())) for module in model.modules()],
        "entries": [
            (list(module._parameters.items()), list(module._buffers.items()), set(module._non_persistent_buffers_set))
            for module in model.modules()
        ],
        "tensors": [
            (t, t.data_ptr(), t._version, t.dtype, t.requires_grad, t.grad, t.detach().clone())
            for t in (*model.parameters(), *model.buffers())
        ],
        "config": copy.deepcopy(model.config.to_dict()),
        "switches": switches(model),
    }


def switches(model) -> tuple:
    return (
        model.config._attn_implementation,
        torch.backends.cuda.flash_sdp_enabled(),
        torch.backends.cuda.mem_efficient_sdp_enabled(),
        torch.backends.cuda.math_sdp_enabled(),
        torch.backends.cuda.cudnn_sdp_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.get_default_dtype(),
        torch.get_rng_state().tolist(),
    )


def assert_unchanged(model, before: dict) -> None:
    after = snapshot(model)
    for (module, old), (module_now, new) in zip(before["attributes"], after["attributes"], strict=True):
        assert module is module_now
        assert [key for key, _ in old] == [key for key, _ in new]
        assert all(a is b for (_, a), (_, b) in zip(old, new, strict=True))
    for old, new in zip(before["entries"], after["entries"], strict=True):
        for old_store, new_store in zip(old[:2], new[:2], strict=True):
            assert [key for key, _ in old_store] == [key for key, _ in new_store]
            assert all(a is b for (_, a), (_, b) in zip(old_store, new_store, strict=True))
        assert old[2] == new[2]
    for old, new in zip(before["tensors"], after["tensors"], strict=True):
        assert old[0] is new[0] and old[1:5] == new[1:5] and old[5] is new[5]
        assert torch.equal(old[6], new[6])
    assert before["config"] == after["config"]
    assert before["switches"] == after["switches"]


@each_model
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_restores_everything(build, training):
    model = build().train(training)
    entropy_sum(model).backward()
    before = snapshot(model)
    with float64_reference(model):
        assert model.training == training
        entropy_sum(model).backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 1.0
    assert_unchanged(model, before)


@pytest.mark.parametrize("build", [MODELS["qwen2-eager"], MODELS["llama-lora"]], ids=["qwen2-eager", "llama-lora"])
def test_restores_everything_when_the_body_raises(build):
    model = build()
    before = snapshot(model)
    with pytest.raises(KeyError, match="body"), float64_reference(model):
        entropy_sum(model)
        raise KeyError("body")
    assert_unchanged(model, before)


def test_restores_everything_when_entering_fails(monkeypatch):
    model = qwen2()
    before = snapshot(model)

    def no_memory(backends):
        raise MemoryError("entering")

    monkeypatch.setattr("trl_entropy.gradients.float64_reference.sdpa_kernel", no_memory)
    with pytest.raises(MemoryError, match="entering"), float64_reference(model):
        pass
    assert_unchanged(model, before)


def test_ties_names_and_requires_grad_are_kept_inside():
    model = lora(qwen2())
    outside = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    with float64_reference(model):
        assert outside == {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        assert causal_lm(model).lm_head.weight is causal_lm(model).model.embed_tokens.weight


def train(model, reference: bool) -> tuple[list[torch.Tensor], dict]:
    """Four AdamW steps in float32 with a gradient hook on each parameter, as DDP has; the reference between them."""
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    calls = []
    for parameter in trainable(model):
        parameter.register_post_accumulate_grad_hook(lambda p: calls.append(p.grad.dtype))
    for step in range(4):
        optimizer.zero_grad(set_to_none=step % 2 == 0)
        entropy_sum(model).backward()
        if reference:
            with float64_reference(model):
                (-entropy_sum(model)).backward()
        optimizer.step()
    assert calls == [torch.float32] * (4 * len(trainable(model)))
    return [p.detach().clone() for p in model.parameters()], optimizer.state_dict()


@pytest.mark.parametrize("build", [MODELS["qwen2-eager"], MODELS["qwen2-lora"]], ids=["full-eager", "lora"])
def test_training_goes_on_identically(build):
    plain, plain_state = train(build(), reference=False)
    mixed, mixed_state = train(build(), reference=True)
    assert all(torch.equal(a, b) for a, b in zip(plain, mixed, strict=True))
    for key, state in plain_state["state"].items():
        assert all(torch.equal(value, mixed_state["state"][key][name]) for name, value in state.items())


# --- It works with what TRL, accelerate and checkpointing do to a model ----------------------------------------------


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("build", [qwen2, MODELS["llama-lora"]], ids=["qwen2", "llama-lora"])
def test_gradient_checkpointing(build, reentrant):
    def gradients(model):
        with float64_reference(model), assert_only_float64():
            entropy_sum(model).backward()
            return [parameter.grad for parameter in trainable(model)]

    expected = gradients(build().train())
    model = build().train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    before = snapshot(model)
    assert all(torch.equal(a, b) for a, b in zip(gradients(model), expected, strict=True))
    assert_unchanged(model, before)


def accelerate_bf16(model):
    """What accelerate does to the model under mixed precision, by accelerate itself."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, PartialState

    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        return Accelerator(mixed_precision="bf16", cpu=True).prepare_model(model)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        PartialState._reset_state()


def fused(model):
    add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    return model


PATCHED = {
    "trl": (lambda: fused(qwen2()), qwen2),
    "trl-lora": (lambda: lora(fused(qwen2())), lambda: lora(qwen2())),
    "accelerate": (lambda: accelerate_bf16(qwen2()), qwen2),
    "trl-accelerate": (lambda: accelerate_bf16(fused(qwen2())), qwen2),
    "trl-lora-accelerate": (lambda: accelerate_bf16(lora(fused(qwen2()))), lambda: lora(qwen2())),
}
each_patch = pytest.mark.parametrize(("build", "plain"), PATCHED.values(), ids=PATCHED.keys())


@each_patch
def test_float64_under_the_patches_of_trl_and_accelerate(build, plain):
    model, unpatched = build(), plain()
    with float64_reference(unpatched):
        expected = entropy_sum(unpatched)
    before = snapshot(model)
    autocast = []
    with float64_reference(model), assert_only_float64():
        head = causal_lm(model).lm_head
        hook = head.register_forward_hook(lambda *args: autocast.append(torch.is_autocast_enabled("cpu")))
        assert torch.equal(entropy_sum(model), expected)
        hook.remove()
    assert autocast == [False]
    assert_unchanged(model, before)


@pytest.mark.parametrize("build", [lambda: fused(qwen2()), PATCHED["trl-lora"][0]], ids=["full", "lora"])
def test_losses_that_compute_in_float32_are_refused_when_called(build):
    model = build()
    input_ids, attention_mask = batch()
    with float64_reference(model):
        with pytest.raises(ValueError, match="fused_lm_head=True"):
            model(input_ids=input_ids, attention_mask=attention_mask, labels=input_ids, fused_lm_head=True)
        with pytest.raises(ValueError, match="labels="):
            model(input_ids=input_ids, attention_mask=attention_mask, labels=input_ids)
    out = model(input_ids=input_ids, attention_mask=attention_mask, labels=input_ids, fused_lm_head=True)
    assert out.log_probs.dtype == torch.float32


# --- It refuses what it does not know --------------------------------------------------------------------------------


class QuantisedLinear(nn.Linear):
    """Stands for bitsandbytes and its like: a subclass of Linear that computes something else."""


def with_quantised_layer():
    model = qwen2()
    model.model.layers[1].mlp.up_proj.__class__ = QuantisedLinear
    return model


def with_int8_weight():
    model = qwen2()
    weight = model.model.layers[1].mlp.up_proj.weight
    model.model.layers[1].mlp.up_proj.weight = nn.Parameter(weight.detach().to(torch.int8), requires_grad=False)
    return model


def with_own_forward(path):
    model = qwen2()
    module = model.get_submodule(path)
    forward = module.forward
    module.forward = lambda *args, **kwargs: forward(*args, **kwargs)
    return model


def with_hook():
    model = qwen2()
    model.model.embed_tokens.register_forward_hook(lambda module, args, output: output.to(torch.bfloat16))
    return model


def with_storage_shared():
    model = qwen2(tie_word_embeddings=False)
    model.lm_head.weight = nn.Parameter(model.model.embed_tokens.weight.data)
    return model


def with_partitioned_weight():
    model = qwen2()
    model.model.norm.weight.data = torch.empty(0)
    return model


def merged():
    model = lora(qwen2())
    model.merge_adapter()
    return model


def compiled_in_place():
    model = qwen2()
    layer = model.model.layers[0]
    layer._compiled_call_impl = layer._call_impl  # as `layer.compile()` does, without 3 s of importing dynamo
    return model


def sliding():
    return qwen2(use_sliding_window=True, sliding_window=4, max_window_layers=1)


def dynamic_rope():
    return llama(rope_parameters={"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 2.0})


def gpt2():
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=1, n_head=2, n_positions=16))


def flash():
    model = qwen2()
    model.config._attn_implementation_internal = "flash_attention_2"
    return model


REFUSED = {
    "architecture": (gpt2, r"'\(the model itself\)' of class transformers\S+GPT2LMHeadModel is not known"),
    "wrapper": (lambda: nn.DataParallel(qwen2()), r"of class torch\S+DataParallel is not known"),
    "no head": (lambda: qwen2().model, r"Qwen2Model is no causal LM"),
    "quantised": (with_quantised_layer, r"'model\.layers\.1\.mlp\.up_proj' of class \S+QuantisedLinear is not known"),
    "int8": (with_int8_weight, r"'model\.layers\.1\.mlp\.up_proj' of class \S+Linear holds 'weight' in torch\.int8"),
    "fp8": (lambda: qwen2().to(torch.float8_e4m3fn), r"class \S+ holds 'weight' in torch\.float8_e4m3fn"),
    "partitioned": (with_partitioned_weight, r"'model\.norm' of class \S+Qwen2RMSNorm holds no values in 'weight'"),
    "shared": (with_storage_shared, r"'lm_head' of class \S+Linear shares the storage of 'weight'"),
    "dora": (lambda: lora(qwen2(), use_dora=True), r"q_proj' of class peft\.\S+ .*DoraLinearVariant"),
    "embedding": (
        lambda: lora(qwen2(), target_modules=["embed_tokens"]),
        r"embed_tokens' of class peft\.tuners\.lora\.layer\.Embedding is not known",
    ),
    "modules_to_save": (
        lambda: lora(qwen2(tie_word_embeddings=False), modules_to_save=["lm_head"]),
        r"lm_head' of class peft\S+ModulesToSaveWrapper is not known",
    ),
    "merged": (merged, r"q_proj' of class peft\S+ has merged adapters \['default'\]"),
    "lora dropout": (lambda: lora(qwen2(), lora_dropout=0.1).train(), r"Dropout is in training mode with p=0\.1"),
    "attention dropout": (
        lambda: qwen2(attention_dropout=0.1).train(),
        r"'model\.layers\.0\.self_attn' of class \S+Qwen2Attention is in training mode with attention_dropout=0\.1",
    ),
    "sliding window": (sliding, r"'model\.layers\.1\.self_attn' of class \S+Qwen2Attention has a sliding window of 4"),
    "rope": (dynamic_rope, r"'model\.rotary_emb' of class \S+LlamaRotaryEmbedding has rope type 'dynamic'"),
    "flash": (flash, r"'model\.layers\.0\.self_attn' of class \S+Qwen2Attention uses attention 'flash_attention_2'"),
    "hook": (with_hook, r"'model\.embed_tokens' of class \S+Embedding has the forward hook \S+<lambda>"),
    "norm patched": (lambda: with_own_forward("model.norm"), r"'model\.norm' of class \S+ has a patched forward"),
    "model patched": (lambda: with_own_forward(""), r"'\(the model itself\)' of class \S+ has a patched forward"),
    "compiled in place": (compiled_in_place, r"'model\.layers\.0' of class \S+ was compiled in place"),
}


@pytest.mark.parametrize(("build", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_refuses_by_name_before_anything_is_changed(build, message):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = build()
    before = snapshot(model) if hasattr(model, "config") else None
    with pytest.raises(ValueError, match=message), float64_reference(model):
        pass
    if before is not None:
        assert_unchanged(model, before)


def test_refuses_a_class_patched_by_a_kernel_library(monkeypatch):
    def kernel_forward(self, x):
        return x

    model = qwen2()
    monkeypatch.setattr(type(model.model.layers[0].mlp), "forward", kernel_forward)
    with pytest.raises(ValueError, match=r"'model\.layers\.0\.mlp'.*put into its class by a patch"):
        float64_reference(model).__enter__()


def test_refuses_a_rotary_function_patched_by_a_kernel_library(monkeypatch):
    monkeypatch.setattr("transformers.models.llama.modeling_llama.apply_rotary_pos_emb", lambda *args: args[:2])
    with pytest.raises(ValueError, match=r"'model\.layers\.0\.self_attn'.*apply_rotary_pos_emb"):
        float64_reference(llama()).__enter__()


def test_refuses_nesting():
    model = qwen2()
    with float64_reference(model), pytest.raises(ValueError, match="nested"), float64_reference(model):
        pass


@pytest.mark.parametrize(
    "build",
    [lambda: lora(qwen2(), lora_dropout=0.1).eval(), lambda: qwen2(attention_dropout=0.1).eval()],
    ids=["lora", "attention"],
)
def test_dropout_is_accepted_in_eval_mode(build):
    model = build()
    with float64_reference(model), assert_only_float64():
        assert torch.equal(entropy_sum(model), entropy_sum(model))


# --- fp32_strict -----------------------------------------------------------------------------------------------------

KNOBS = [("generic", "all"), ("cuda", "all"), ("mkldnn", "all")] + [
    (backend, op) for backend in ("cuda", "mkldnn") for op in ("matmul", "conv", "rnn")
]


def fp32_state() -> tuple:
    """What torch would compute in: each knob as it resolves, alone and under another parent; the legacy switches."""

    def knobs():
        return [torch._C._get_fp32_precision_getter(*knob) for knob in KNOBS]

    def legacy(read):
        try:
            return read()
        except RuntimeError:
            return "contradicted by the new API"

    generic = knobs()
    torch._C._set_fp32_precision_setter("generic", "all", "bf16" if generic[0] != "bf16" else "ieee")
    elsewhere = knobs()
    torch._C._set_fp32_precision_setter("generic", "all", generic[0])
    return (
        generic,
        elsewhere,
        legacy(torch.get_float32_matmul_precision),
        legacy(lambda: torch.backends.cuda.matmul.allow_tf32),
        legacy(lambda: torch.backends.cudnn.allow_tf32),
    )


@pytest.fixture
def clean_fp32_state():
    start = [(knob, torch._C._get_fp32_precision_getter(*knob)) for knob in KNOBS]
    precision = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(precision)
    for knob, value in start:
        if torch._C._get_fp32_precision_getter(*knob) != value:
            torch._C._set_fp32_precision_setter(*knob, value)


# The last two, since what they set can be put back to the same value but not to "never set"
TF32_ON = {
    "default": lambda: None,
    "high": lambda: torch.set_float32_matmul_precision("high"),
    "medium": lambda: torch.set_float32_matmul_precision("medium"),
    "allow_tf32": lambda: setattr(torch.backends.cuda.matmul, "allow_tf32", True),
    "new matmul": lambda: setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32"),
    "new generic": lambda: setattr(torch.backends, "fp32_precision", "tf32"),
    "new mkldnn": lambda: torch._C._set_fp32_precision_setter("mkldnn", "all", "bf16"),
    "new mkldnn conv": lambda: setattr(torch.backends.mkldnn.conv, "fp32_precision", "tf32"),
    "new cudnn conv": lambda: setattr(torch.backends.cudnn.conv, "fp32_precision", "tf32"),
    "legacy cudnn": lambda: setattr(torch.backends.cudnn, "allow_tf32", True),
}


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("turn_on", TF32_ON.values(), ids=TF32_ON.keys())
def test_fp32_strict_turns_tf32_off_and_restores(clean_fp32_state, turn_on, fails):
    turn_on()
    before = fp32_state()
    try:
        with fp32_strict():
            assert [torch._C._get_fp32_precision_getter(*knob) for knob in KNOBS[3:]] == ["ieee"] * 6
            assert not torch.backends.cuda.matmul.allow_tf32
            assert torch.get_float32_matmul_precision() == "highest"
            if fails:
                raise KeyError
    except KeyError:
        assert fails
    assert fp32_state() == before


def test_fp32_strict_wins_over_high_precision_set_before(clean_fp32_state):
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.set_float32_matmul_precision("high")
    assert torch.backends.cuda.matmul.allow_tf32
    with fp32_strict():
        assert not torch.backends.cuda.matmul.allow_tf32
        assert torch.get_float32_matmul_precision() == "highest"
    assert torch.backends.cuda.matmul.allow_tf32


def test_fp32_strict_disables_autocast_around_it():
    model = qwen2()
    expected = entropy_sum(model)
    with torch.autocast("cpu", torch.bfloat16):
        assert not torch.equal(entropy_sum(model), expected)
        with fp32_strict():
            assert torch.equal(entropy_sum(model), expected)
        assert torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("case", ["accelerate", "trl-accelerate", "trl-lora-accelerate"])
def test_fp32_strict_with_a_model_undoes_the_autocast_of_accelerate(case):
    model, expected = PATCHED[case][0](), entropy_sum(PATCHED[case][1]())
    before = snapshot(model)
    with fp32_strict():
        assert not torch.equal(entropy_sum(model), expected), "accelerate no longer autocasts inside forward"
    with fp32_strict(model):
        assert torch.equal(entropy_sum(model), expected)
    assert_unchanged(model, before)
