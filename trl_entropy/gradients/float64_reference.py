"""A float64 reference: a context in which a model computes everything in float64.

`model.double()` is not enough for that: the RMSNorm and the rotary embedding of transformers cast to float32 inside,
and eager attention takes its softmax in float32. [`float64_reference`] replaces exactly these, and refuses a model in
which it finds anything that it does not know, since such a model might still compute in float32.
"""

import functools
import inspect
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from trl_entropy.engine.strict_float32 import autocast_off, patched

# What each known class is, by its full name and not by `isinstance`: a subclass (quantised, sharded, fused by a kernel
# library) computes something else, and a library that rebinds a class in place leaves a name that is not listed here.
_PARTS = ("ForCausalLM", "Model", "DecoderLayer", "Attention", "MLP", "RMSNorm", "RotaryEmbedding")
_ROLES: dict[str, str] = {
    **{f"transformers.models.qwen2.modeling_qwen2.Qwen2{part}": part for part in _PARTS},
    **{f"transformers.models.llama.modeling_llama.Llama{part}": part for part in _PARTS},
    "transformers.activations.SiLUActivation": "activation",
    "torch.nn.modules.activation.SiLU": "activation",
    "torch.nn.modules.linear.Linear": "Linear",
    "torch.nn.modules.linear.Identity": "Identity",
    "torch.nn.modules.sparse.Embedding": "Embedding",
    "torch.nn.modules.dropout.Dropout": "Dropout",
    "torch.nn.modules.container.ModuleList": "container",
    "torch.nn.modules.container.ModuleDict": "container",
    "torch.nn.modules.container.ParameterDict": "container",
    "peft.peft_model.PeftModelForCausalLM": "PeftModel",
    "peft.tuners.lora.model.LoraModel": "container",
    "peft.tuners.lora.layer.Linear": "LoraLinear",
}
# Their forward reads `inv_freq` and `attention_scaling` and nothing else; "dynamic" and "longrope" recompute these in
# float32 as the sequence grows.
_ROPE_TYPES = ("default", "linear", "llama3", "yarn")
_HARMLESS_HOOKS = (
    ("transformers.modeling_utils", "make_inputs_require_grads"),
    ("transformers.utils.output_capturing", "output_capturing_hook"),
)
_FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@contextmanager
def float64_reference(model: nn.Module) -> Iterator[None]:
    """Makes a Qwen2 or Llama causal LM, plain or with LoRA, truly float64 inside the block.

    The block sees *copies*: `model.parameters()` and `model.named_parameters()` are float64 leaves with the names,
    ties and `requires_grad` of the originals. Fetch them inside the block; what is done to them (gradients, steps in
    a direction) ends with it. The original parameters are not touched at all, so optimizer references, `.grad`, the
    gradient hooks of DDP and DeepSpeed and the storage stay as they were.

    Replaced for the duration: parameters and buffers; `forward` of every RMSNorm and rotary embedding; the attention
    implementation, by SDPA on its math backend (which can be differentiated twice); `forward` of the causal LM, by
    that of its class, without TRL's fused head and accelerate's autocast. Autocast is off. All is put back on leaving,
    also when the body raises. The math backend is chosen for the whole process, and another model that shares this
    one's `config` object sees SDPA too: score one model at a time.

    The rotary frequencies are the model's own buffer, widened. It was rounded when the model was built or cast, and is
    a constant of the function that is trained, like a frozen weight: the reference is of that function.

    Run forward *and* backward inside the block, since gradient checkpointing recomputes during backward. Take losses
    from `model(input_ids, attention_mask).logits`: `labels=` and `fused_lm_head=True` compute in float32 and are
    refused when called.

    Memory: 8 bytes a parameter, beside the original.

    Args:
        model (`torch.nn.Module`):
            A `Qwen2ForCausalLM` or `LlamaForCausalLM`, or a `PeftModelForCausalLM` around one with vanilla LoRA on
            linear layers. Unwrap it from DDP or DeepSpeed first.

    Raises:
        `ValueError`: before anything is changed, with the name and class of the module that is not known to run in
            float64: other architectures, quantised layers, DoRA and other variants, merged adapters, active dropout,
            sliding windows, rope types that change with the length, patched forwards, foreign hooks, sharded
            parameters.
    """
    _check_model(model)
    copies = _float64_copies(model)
    with ExitStack() as undo:
        for store, name, copy in copies:
            undo.callback(store.__setitem__, name, store[name])
            store[name] = copy
        for module in model.modules():
            forward = _FORWARDS.get(_role(module))
            if forward is not None:
                patched(undo, module, "forward", forward(module))
            if _role(module) == "ForCausalLM":
                undo.callback(module.set_attn_implementation, module.config._attn_implementation)
                module.set_attn_implementation("sdpa")
        undo.enter_context(sdpa_kernel([SDPBackend.MATH]))
        undo.enter_context(autocast_off())
        yield


# --- What is replaced ------------------------------------------------------------------------------------------------


def _rms_norm_forward(self: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
    variance = hidden_states.pow(2).mean(-1, keepdim=True)
    return self.weight * (hidden_states * torch.rsqrt(variance + self.variance_epsilon))


@torch.no_grad()
def _rotary_forward(self: nn.Module, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    freqs = position_ids[..., None].to(x.dtype) * self.inv_freq
    emb = torch.cat((freqs, freqs), dim=-1)
    return emb.cos() * self.attention_scaling, emb.sin() * self.attention_scaling


def _logits_forward(model: nn.Module) -> Callable:
    plain = _class_forward(model)

    @functools.wraps(plain)
    def forward(*args: object, fused_lm_head: bool = False, labels: object = None, **kwargs: object) -> object:
        if fused_lm_head or labels is not None:
            raise ValueError(
                "float64_reference: the model's own loss (labels=) and TRL's fused head (fused_lm_head=True) compute "
                "in float32. Call model(input_ids, attention_mask) and take the loss from `.logits`."
            )
        return plain(*args, **kwargs)

    return forward


def _class_forward(module: nn.Module) -> Callable:
    return types.MethodType(type(module).forward, module)


_FORWARDS: dict[str | None, Callable] = {
    "RMSNorm": lambda module: types.MethodType(_rms_norm_forward, module),
    "RotaryEmbedding": lambda module: types.MethodType(_rotary_forward, module),
    "ForCausalLM": _logits_forward,
    "PeftModel": _class_forward,
}


def _float64_copies(model: nn.Module) -> list[tuple[dict, str, torch.Tensor]]:
    """Returns (dictionary, name, float64 copy) of every floating parameter and buffer; tied tensors share one copy.

    Copies in the modules' dictionaries, not `p.data = p.data.double()`: a change of dtype under a Parameter throws its
    gradient accumulator away, and with it the hooks by which DDP and DeepSpeed reduce gradients.
    """
    copies: dict[int, torch.Tensor] = {}
    found = []
    for module in model.modules():
        for store in (module._parameters, module._buffers):
            for name, tensor in store.items():
                if tensor is None or not tensor.is_floating_point():
                    continue
                if id(tensor) not in copies:
                    copies[id(tensor)] = _float64_copy(tensor)
                found.append((store, name, copies[id(tensor)]))
    return found


def _float64_copy(tensor: torch.Tensor) -> torch.Tensor:
    copy = tensor.detach().to(torch.float64, copy=True)
    return nn.Parameter(copy, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else copy


# --- What is refused -------------------------------------------------------------------------------------------------


def _qualified(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _role(module: nn.Module) -> str | None:
    return _ROLES.get(_qualified(type(module)))


def _check_model(model: nn.Module) -> None:
    owners: dict[int, torch.Tensor] = {}
    for name, module in model.named_modules():
        for objection in _objections(module, owners):
            raise ValueError(
                f"float64_reference: module {name or '(the model itself)'!r} of class {_qualified(type(module))} "
                f"{objection}. Nothing was changed."
            )
    if sum(_role(module) == "ForCausalLM" for module in model.modules()) != 1:
        raise ValueError(
            f"float64_reference: {_qualified(type(model))} is no causal LM and does not hold exactly one. Pass the "
            "Qwen2ForCausalLM or LlamaForCausalLM, or the PEFT model around it. Nothing was changed."
        )


def _objections(module: nn.Module, owners: dict[int, torch.Tensor]) -> Iterator[str]:
    role = _role(module)
    if role is None:
        yield (
            "is not known to run in float64: known are Qwen2 and Llama causal LMs, plain or with vanilla LoRA on "
            "linear layers, not wrapped by DDP, DeepSpeed, FSDP or torch.compile"
        )
    yield from _forward_objections(module, role)
    yield from _hook_objections(module)
    for name, tensor in (*module._parameters.items(), *module._buffers.items()):
        if tensor is not None:
            yield from _tensor_objections(name, tensor, owners)
    yield from _ROLE_OBJECTIONS.get(role, lambda _: ())(module)


def _forward_objections(module: nn.Module, role: str | None) -> Iterator[str]:
    owner = next(cls for cls in type(module).__mro__ if "forward" in vars(cls))
    if getattr(owner.forward, "__module__", None) != owner.__module__:  # type: ignore[attr-defined]
        home = getattr(owner.forward, "__module__", None)  # type: ignore[attr-defined]
        yield f"has a forward from {home}, put into its class by a patch"
    if module._compiled_call_impl is not None:
        yield "was compiled in place by .compile()"
    if "forward" in vars(module) and not (
        role in ("ForCausalLM", "PeftModel") and _is_known_patch(module, module.forward)
    ):
        yield "has a patched forward, neither of TRL's fused head nor of accelerate (or float64_reference is nested)"


def _is_known_patch(module: nn.Module, forward: object) -> bool:
    """Whether `forward` is the class's own, under any number of the wrappers that TRL and accelerate put around it."""
    function = getattr(forward, "__func__", forward)
    if function is type(module).forward:
        return True
    if not inspect.isfunction(function):
        return False
    # Not `__module__` and `__name__`: both libraries copy these from what they wrap
    origin = (function.__globals__["__name__"], function.__code__.co_name)
    if origin == ("trl.trainer.utils", "_fused_forward"):
        return _is_known_patch(module, inspect.getclosurevars(function).nonlocals["original_forward"])
    original = vars(module).get("_original_forward")
    if origin == ("accelerate.utils.operations", "forward") and original is not forward:
        return _is_known_patch(module, original)
    return False


def _hook_objections(module: nn.Module) -> Iterator[str]:
    for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values()):
        function = hook.func if isinstance(hook, functools.partial) else hook
        origin = (getattr(function, "__module__", "?"), getattr(function, "__name__", type(function).__name__))
        if origin not in _HARMLESS_HOOKS and not origin[0].startswith("trl_entropy."):
            yield f"has the forward hook {origin[0]}.{origin[1]}, which may compute in another precision; remove it"


def _tensor_objections(name: str, tensor: torch.Tensor, owners: dict[int, torch.Tensor]) -> Iterator[str]:
    if type(tensor) not in (nn.Parameter, torch.Tensor):
        yield f"holds {name!r} as a {_qualified(type(tensor))} (quantised or sharded)"
    elif tensor.is_meta or tensor.numel() == 0:
        yield f"holds no values in {name!r} (on the meta device, offloaded, or partitioned by ZeRO-3)"
    elif isinstance(tensor, nn.Parameter) or tensor.is_floating_point():
        if tensor.dtype not in _FLOAT_DTYPES:
            yield f"holds {name!r} in {tensor.dtype} (quantised)"
        # A copy of each would move apart what training moves together
        if isinstance(tensor, nn.Parameter) and owners.setdefault(tensor.data_ptr(), tensor) is not tensor:
            yield f"shares the storage of {name!r} with another parameter without being the same object"


def _attention_objections(module: nn.Module) -> Iterator[str]:
    rotate = vars(sys.modules[type(module).__module__])["apply_rotary_pos_emb"]
    if getattr(rotate, "__module__", None) != type(module).__module__:
        yield f"uses an apply_rotary_pos_emb from {getattr(rotate, '__module__', None)}, put in by a patch"
    if module.config._attn_implementation not in ("eager", "sdpa"):
        yield f"uses attention {module.config._attn_implementation!r}; load the model with 'sdpa' or 'eager'"
    if getattr(module, "sliding_window", None) is not None:
        yield f"has a sliding window of {module.sliding_window} tokens"
    if module.training and module.attention_dropout > 0:
        yield f"is in training mode with attention_dropout={module.attention_dropout}; call .eval() or set it to 0"


def _rotary_objections(module: nn.Module) -> Iterator[str]:
    if module.rope_type not in _ROPE_TYPES:
        yield f"has rope type {module.rope_type!r}; known are {', '.join(_ROPE_TYPES)}"


def _dropout_objections(module: nn.Module) -> Iterator[str]:
    if module.training and module.p > 0:
        yield f"is in training mode with p={module.p}; call .eval() or set it to 0"


def _lora_objections(module: nn.Module) -> Iterator[str]:
    for adapter, variant in module.lora_variant.items():
        yield f"has adapter {adapter!r} of variant {type(variant).__name__}; only vanilla LoRA is known"
    if module.merged_adapters:
        yield f"has merged adapters {module.merged_adapters}; unmerge them, so that the output depends on them"


_ROLE_OBJECTIONS: dict[str | None, Callable] = {
    "Attention": _attention_objections,
    "RotaryEmbedding": _rotary_objections,
    "Dropout": _dropout_objections,
    "LoraLinear": _lora_objections,
}
