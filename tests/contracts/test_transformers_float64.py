"""What `gradients/float64_reference.py` relies on in transformers, PEFT, TRL, accelerate and torch. A failure says
which upstream fact changed and what to read again; `tests/gradients/test_float64_reference.py` has the mode."""

import importlib
import inspect

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm, Qwen2RotaryEmbedding
from trl.trainer.utils import add_fused_lm_head

from trl_entropy.gradients import float64_reference as precision

READ_AGAIN = "upstream changed: read it again and adapt trl_entropy/gradients/float64_reference.py"
SIZES = {
    "vocab_size": 31,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
FAMILIES = {"qwen2": (Qwen2ForCausalLM, Qwen2Config), "llama": (LlamaForCausalLM, LlamaConfig)}
INPUT_IDS = torch.arange(12).view(2, 6)


def build(family: str, **overrides):
    torch.manual_seed(0)
    model_class, config_class = FAMILIES[family]
    return model_class(config_class(**SIZES | overrides))


@pytest.mark.parametrize("name", precision._ROLES)
def test_known_classes_exist_and_own_their_forward(name):
    module, _, cls = name.rpartition(".")
    cls = getattr(importlib.import_module(module), cls, None)
    assert cls is not None, f"{name} is gone; {READ_AGAIN}"
    assert precision._qualified(cls) == name, f"{name} is now {precision._qualified(cls)}; {READ_AGAIN}"
    owner = next(base for base in cls.__mro__ if "forward" in vars(base))
    assert owner.forward.__module__ == owner.__module__, f"{name}.forward comes from elsewhere; {READ_AGAIN}"


class Float32Places(TorchDispatchMode):
    """Collects the class of the innermost module in which an operation makes a float32 tensor."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.stack, self.places = ["outside"], set()
        for module in model.modules():
            module.register_forward_pre_hook(lambda module, args: self.stack.append(type(module).__name__))
            module.register_forward_hook(lambda module, args, output: self.stack.pop() and None)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if any(isinstance(leaf, torch.Tensor) and leaf.dtype == torch.float32 for leaf in tree_leaves(out)):
            self.places.add(self.stack[-1])
        return out


@pytest.mark.parametrize("with_lora", [False, True], ids=["plain", "lora"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_only_float32_inside_a_double_model(family, attention, with_lora):
    model = build(family, attn_implementation=attention)
    if with_lora:
        model = get_peft_model(model, LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    model.double()
    with Float32Places(model) as found, sdpa_kernel([SDPBackend.MATH]), torch.no_grad():
        model(input_ids=INPUT_IDS, attention_mask=torch.ones_like(INPUT_IDS).tril(3))
    prefix = {"qwen2": "Qwen2", "llama": "Llama"}[family]
    expected = {f"{prefix}RMSNorm", f"{prefix}RotaryEmbedding"}
    if attention == "eager":
        expected.add(f"{prefix}Attention")
    assert found.places == expected, f"float32 arises in {found.places}, the mode replaces {expected}; {READ_AGAIN}"


@pytest.mark.parametrize("norm_class", [Qwen2RMSNorm, LlamaRMSNorm])
def test_rms_norm_is_the_upstream_one_without_its_casts(norm_class):
    norm = norm_class(32, eps=1e-5)
    norm.weight.data.normal_()
    x = torch.randn(3, 32)
    assert torch.equal(precision._rms_norm_forward(norm, x), norm(x)), f"{norm_class.__name__}: {READ_AGAIN}"


@pytest.mark.parametrize("rope_type", precision._ROPE_TYPES)
@pytest.mark.parametrize(
    ("rotary_class", "config_class"), [(Qwen2RotaryEmbedding, Qwen2Config), (LlamaRotaryEmbedding, LlamaConfig)]
)
def test_rotary_is_the_upstream_one_without_its_casts(rotary_class, config_class, rope_type):
    rope = {"rope_type": rope_type, "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
    if rope_type == "llama3":
        rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rotary = rotary_class(config_class(**SIZES, rope_parameters=rope))
    frequencies, values = rotary.inv_freq, rotary.inv_freq.clone()
    x, position_ids = torch.randn(1, 3, 32), torch.tensor([[0, 7, 100_000]])
    ours, theirs = precision._rotary_forward(rotary, x, position_ids), rotary(x, position_ids)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True)), f"{rotary_class.__name__}: {READ_AGAIN}"
    unchanged = rotary.inv_freq is frequencies and torch.equal(frequencies, values)
    assert unchanged, f"rope type {rope_type!r} now recomputes its frequencies; {READ_AGAIN}"


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_attributes(family):
    model = build(family, attn_implementation="eager")
    attention = model.model.layers[0].self_attn
    for name in ("attention_dropout", "config", "training"):
        assert hasattr(attention, name), f"attention has no {name!r}; {READ_AGAIN}"
    assert attention.config is model.config, f"attention no longer shares the model's config; {READ_AGAIN}"
    assert hasattr(attention, "sliding_window") == (family == "qwen2"), f"sliding window moved; {READ_AGAIN}"
    before = dict(vars(model.config))
    model.set_attn_implementation("sdpa")
    assert model.config._attn_implementation == "sdpa", f"set_attn_implementation does nothing; {READ_AGAIN}"
    model.set_attn_implementation("eager")
    assert dict(vars(model.config)) == before, f"set_attn_implementation leaves a trace in the config; {READ_AGAIN}"


def test_lora_layer_attributes():
    model = get_peft_model(build("qwen2"), LoraConfig(use_dora=True, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    assert layer.lora_variant, f"DoRA no longer shows in lora_variant; {READ_AGAIN}"
    assert layer.merged_adapters == [], f"merged_adapters of an unmerged layer is not empty; {READ_AGAIN}"
    model.merge_adapter()
    assert layer.merged_adapters == ["default"], f"merged_adapters of a merged layer is empty; {READ_AGAIN}"


def test_hooks_of_transformers_are_known():
    model = build("llama")
    model.enable_input_require_grads()
    model(input_ids=INPUT_IDS, output_hidden_states=True)
    hooks = [hook for module in model.modules() for hook in module._forward_hooks.values()]
    assert len(hooks) > 1, f"transformers no longer captures outputs by hooks; {READ_AGAIN}"
    objections = [objection for module in model.modules() for objection in precision._hook_objections(module)]
    assert objections == [], f"transformers registers other hooks; {READ_AGAIN}"


def test_fused_head_of_trl_is_known_and_computes_in_float32():
    model = build("qwen2")
    add_fused_lm_head(model)
    assert precision._is_known_patch(model, model.forward), f"add_fused_lm_head patches otherwise; {READ_AGAIN}"
    out = model.double()(input_ids=INPUT_IDS, labels=INPUT_IDS, fused_lm_head=True)
    assert out.log_probs.dtype == torch.float32, "TRL's fused head keeps float64 now: it need not be refused"


def test_loss_of_transformers_computes_in_float32():
    loss = build("qwen2").double()(input_ids=INPUT_IDS, labels=INPUT_IDS).loss
    assert loss.dtype == torch.float32, "the loss of transformers keeps float64 now: labels= need not be refused"


def test_accelerate_wraps_forward_by_a_known_function():
    from accelerate.utils.operations import convert_outputs_to_fp32

    wrapped = convert_outputs_to_fp32(build("qwen2").forward)
    origin = (wrapped.__globals__["__name__"], wrapped.__code__.co_name)
    assert origin == ("accelerate.utils.operations", "forward"), f"accelerate wraps otherwise; {READ_AGAIN}"


def test_compile_in_place_sets_the_attribute_that_is_refused():
    assert "_compiled_call_impl" in inspect.getsource(nn.Module.compile), f"Module.compile: {READ_AGAIN}"


def test_a_change_of_dtype_under_a_parameter_loses_its_gradient_accumulator():
    """Why the mode puts copies in the modules: DDP and DeepSpeed hang their hooks on the accumulator."""
    parameter, calls = nn.Parameter(torch.ones(2)), []
    accumulator = parameter.expand_as(parameter).grad_fn.next_functions[0][0]
    accumulator.register_hook(lambda *args: calls.append("called"))
    original = parameter.data
    parameter.data = original.double()
    parameter.data = original
    parameter.sum().backward()
    assert calls == [], "torch keeps the accumulator now: `p.data = p.data.double()` would do"


def test_oneDNN_precision_cannot_be_set_by_its_public_name():
    """Why `fp32_strict` goes through torch._C."""
    before = torch._C._get_fp32_precision_getter("generic", "all")
    try:
        torch.backends.mkldnn.fp32_precision = "ieee"
        generic = torch._C._get_fp32_precision_getter("generic", "all")
    finally:
        torch._C._set_fp32_precision_setter("generic", "all", before)
    assert generic == "ieee", "torch.backends.mkldnn.fp32_precision writes its own knob now: use the public names"


def test_an_unset_knob_reads_as_its_parent():
    read, write = torch._C._get_fp32_precision_getter, torch._C._set_fp32_precision_setter
    before = [(knob, read(*knob)) for knob in (("generic", "all"), ("mkldnn", "all"), ("mkldnn", "rnn"))]
    try:
        for knob, _ in before:
            write(*knob, "none")
        write("generic", "all", "ieee")
        assert read("mkldnn", "rnn") == "ieee", f"precision knobs: {READ_AGAIN}"
    finally:
        for knob, value in before:
            write(*knob, value)
