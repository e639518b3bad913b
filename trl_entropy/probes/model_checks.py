"""
What a model must be for a probe's equation to hold; each refusal names what was found, and says why and what to do.

A probe calls these in `check_model`, which is asked when the trainer is built and again when training begins.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from trl_entropy.config.probe_checks import ProbeChecks
from trl_entropy.config.settings_file import one_line
from trl_entropy.engine.attention import attention_of, can_switch_attention, scored_attention
from trl_entropy.engine.parameters import evaluation_mode, parameter_shape, swapped_parameters, trainable_parameters
from trl_entropy.engine.strict_float32 import fp32_strict
from trl_entropy.gradients.auxiliary_loss import auxiliary_coefficient
from trl_entropy.gradients.inputs import base_model, counts_columns
from trl_entropy.gradients.layer_rules import Layer, trained_layers
from trl_entropy.gradients.row_proof import prove_rows
from trl_entropy.gradients.scores import score
from trl_entropy.rollouts.completions import Completions

# Numbers of a model's parameters by which a trial differentiates, at most: a part of them is enough to meet a kernel.
_MAX_TRIED = 2**24
_MAX_ON_CPU = 2**30  # numbers of a model's parameters with which it is tried on a CPU, at most
# Nats by which scores may differ in float32 where rows are padded otherwise.
_ROUNDING = 1e-2
# Whether derivatives of a model have been tried, and on which device.
_TRIED: WeakKeyDictionary[nn.Module, tuple[bool, torch.device]] = WeakKeyDictionary()
# The device and the trainable parameters with which the gradients of sequences were seen to be their own.
_PROVEN: WeakKeyDictionary[nn.Module, tuple[torch.device, tuple[str, ...]]] = WeakKeyDictionary()


def check_scoring(model: nn.Module, what: str, derivatives: bool = False) -> None:
    """
    Raises `ValueError` unless the model can be scored in float32, alike however its rows are padded, and if
    `derivatives` are needed with those in forward mode. A few tokens are scored to see it.
    """
    _check_attention(model, what)
    _check_whole_precision(model, what)
    if names := [name for name, config in adapters_of(model).items() if getattr(config, "is_prompt_learning", False)]:
        kind = adapters_of(model)[names[0]].peft_type.value
        raise ValueError(
            f"{what} scores each row without the columns that other rows need, but the model is trained by {kind}, "
            "whose virtual tokens stand before the padding: how far they are from a prompt depends on the batch. Use "
            "LoRA, or turn it off."
        )
    if not _can_be_tried(model):
        return
    device = next(model.parameters()).device
    tried = _TRIED.get(model)
    if tried not in ((derivatives, device), (True, device)):  # another device may have other kernels
        with fp32_strict(model), scored_attention(model), _in_float32(model):
            _try_scoring(model, what)
            if derivatives:
                _try_derivatives(model, what)
        _TRIED[model] = derivatives, device


def check_sequences(model: nn.Module, what: str) -> None:
    """
    Raises `ValueError` unless hooks on the layers see each sequence's own gradient: a few tokens are differentiated
    both ways to see it.
    """
    layers = trained_layers(model, trainable_parameters(model))  # raises for what mixes sequences
    if not _can_be_tried(model):
        return _check_partitioned(layers, what)
    seen = next(model.parameters()).device, tuple(name for layer in layers for name in layer.parameters.values())
    if _PROVEN.get(model) == seen:
        return
    try:
        with evaluation_mode(model), scored_attention(model):
            prove_rows(model, _trial(model))
    except (ValueError, RuntimeError) as error:
        raise ValueError(
            f"{what} needs each sequence's own gradient, but {one_line(error)}. Train other layers, or turn it off."
        ) from error
    _PROVEN[model] = seen


def _check_partitioned(layers: list[Layer], what: str) -> None:
    for layer in layers:
        params = dict(layer.module.named_parameters())
        shapes = [parameter_shape(params[key]) for key in layer.parameters]
        is_partitioned = any(_is_partitioned(params[key]) for key in layer.parameters)
        if is_partitioned and not layer.rules and (layer.has_parts or any(len(shape) != 1 for shape in shapes)):
            raise ValueError(
                f"{what} needs each sequence's own gradient, for which module {layer.name!r} of class "
                f"{type(layer.module).__name__} is computed again with its weights, and ZeRO-3 or FSDP has them "
                "partitioned. Set zero_stage: 2, train other layers, or turn it off."
            )


def check_derivatives(model: nn.Module, what: str) -> None:
    """Raises `ValueError` if what autograd gives is not the derivative of the model's scores."""
    if any(getattr(config, "use_dora", False) for config in adapters_of(model).values()):
        raise ValueError(
            f"{what} predicts the change that an update makes, but use_dora=True leaves the norm of the weights out "
            "of the derivative, so that no prediction to first order holds. Set use_dora=False, or turn it off."
        )


def check_float32_parameters(model: nn.Module, what: str) -> None:
    """Raises `ValueError` if a parameter that is trained is narrower, so that rounding would lose a small change."""
    narrow = next(
        ((name, p.dtype) for name, p in model.named_parameters() if p.requires_grad and p.itemsize < 4), None
    )
    if narrow is not None:
        raise ValueError(
            f"{what} adds a correction to the parameters after the step, but {narrow[0]!r} is {narrow[1]}, whose "
            "rounding would lose most of it. Load the model with dtype='float32' (bf16=True computes in bf16 all the "
            "same), or use DeepSpeed."
        )


def check_no_dropout(model: nn.Module, what: str) -> None:
    """Raises `ValueError` if training computes with dropout, naming its settings."""
    found = dropout_of(model)
    if not found:
        return
    named = ", ".join(f"{name}={rate:g}" for name, rate in found.items())
    zero = ", ".join(f"{name}=0" for name in found)
    raise ValueError(
        f"{named}: {what} computes the gradients of a step again, without dropout, and those of training have it: "
        f"each pass leaves out other activations. Set {zero} (disable_dropout=True does it for modules of dropout), "
        "or turn it off."
    )


def check_drawn_without_dropout(model: nn.Module, what: str) -> None:
    """Raises `ValueError` if training draws its completions with dropout, naming its settings."""
    if found := dropout_of(model):
        named = ", ".join(f"{name}={rate:g}" for name, rate in found.items())
        zero = ", ".join(f"{name}=0" for name in found)
        raise ValueError(
            f"{named}: {what} needs completions drawn from the policy, and training draws its own with dropout, from "
            f"another policy at each token. Set {zero} (disable_dropout=True does it for modules of dropout), or "
            "entropy_probe_completions='held_out'."
        )


def check_no_auxiliary_loss(args: ProbeChecks, model: nn.Module, what: str) -> None:
    """Raises `ValueError` if TRL adds the loss that balances the load of a mixture's experts."""
    if coefficient := auxiliary_coefficient(args, model):
        raise ValueError(
            f"{what} needs a loss that is a sum over completions, but router_aux_loss_coef={coefficient:g} adds the "
            "balance of the experts over all tokens of a micro-batch. Set router_aux_loss_coef=0, or turn it off."
        )


def check_own_completions(model: nn.Module, what: str) -> None:
    """Raises `ValueError` unless a step's completions are draws of the policy that its loss evaluates."""
    if counts_columns(model):
        raise ValueError(
            f"{what} needs completions drawn from the policy that is trained, but this model learns a vector for each "
            "position, which generation counts from a prompt's first token and TRL's loss from the first column of "
            "the padded batch. Use a model with rotary positions, or completions that are drawn for the purpose."
        )


def check_full_distribution(args: ProbeChecks, model: nn.Module, what: str) -> None:
    """Raises `ValueError` if settings of the run, or the model's own, keep tokens from being drawn in training."""
    own = getattr(base_model(model), "generation_config", None)
    if args.use_vllm:  # vLLM does not read the model's own settings
        own = None
    args.check_full_distribution([what], None if own is None else own.to_dict())


def draws_full_distribution(args: ProbeChecks, model: nn.Module) -> bool:
    """Whether [`check_full_distribution`] has no objection."""
    try:
        check_full_distribution(args, model, "")
    except ValueError:
        return False
    return True


def dropout_of(model: nn.Module) -> dict[str, float]:
    """The rates of dropout and of other noise that training computes with, by the name of their setting."""
    found: dict[str, float] = {}
    for path, module in model.named_modules():
        parts = [part for part in path.split(".") if "drop" in part.lower()]
        if "dropout" in type(module).__name__.lower() and _rate(getattr(module, "p", 0.0)):
            found[parts[-1] if parts else "dropout"] = _rate(module.p)
        found |= dict(_rates_of_attributes(module))
    return found


def _rates_of_attributes(module: nn.Module) -> Iterator[tuple[str, float]]:
    """Models hand their rates to functions too (`attention_dropout`), and peft keeps some by adapter."""
    for name, value in vars(module).items():
        if any(word in name.lower() for word in ("dropout", "drop_path", "layerdrop", "jitter")):
            rates = [_rate(one) for one in (value.values() if isinstance(value, Mapping) else [value])]
            if any(rates):
                yield name, max(rates)


def _rate(value: object) -> float:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) and value > 0 else 0.0


def adapters_of(model: nn.Module) -> Mapping[str, Any]:
    """The configurations of peft's adapters on the model, by name; none without peft."""
    found = getattr(model, "peft_config", None)
    return found if isinstance(found, Mapping) else {}


# ---- scoring


def _check_attention(model: nn.Module, what: str) -> None:
    others = [config._attn_implementation for config in attention_of(model).values()]
    if others and not can_switch_attention(model):
        raise ValueError(
            f"{what} scores in float32, with derivatives, which attn_implementation={others[0]!r} does not compute, "
            f"and {type(base_model(model)).__name__} keeps the kernel that it was built with. Set attn_implementation "
            "to 'sdpa' or 'eager' (in model_init_kwargs), or turn it off."
        )


def _check_whole_precision(model: nn.Module, what: str) -> None:
    for name, param in model.named_parameters():
        if not param.is_floating_point():
            raise ValueError(
                f"{what} scores in float32, but {name!r} is quantised ({param.dtype}). Load the model in bfloat16, or "
                "turn it off."
            )


def _can_be_tried(model: nn.Module) -> bool:
    """
    Whether this process alone can call the model, in seconds: its parameters are neither sharded nor without data, and
    it is no large model that waits on the CPU for DeepSpeed to place it, when training begins.
    """
    params = list(model.parameters())
    waits = sum(param.numel() for param in params if param.device.type == "cpu") > _MAX_ON_CPU
    return not waits and not any(_is_partitioned(param) or param.is_meta for param in params)


def _is_partitioned(param: nn.Parameter) -> bool:
    return hasattr(param, "ds_id") or hasattr(param, "device_mesh")


@contextlib.contextmanager
def _in_float32(model: nn.Module) -> Iterator[None]:
    """As probes score: in narrower dtypes rounding would hide what is looked for."""
    if all(param.itemsize >= 4 for param in model.parameters()):
        yield
        return
    values = {name: param.detach().float() for name, param in trainable_parameters(model).items()}
    with swapped_parameters(model, values, torch.float32):
        yield


def _try_scoring(model: nn.Module, what: str) -> None:
    both, name = _trial(model), type(base_model(model)).__name__
    padded = score(model, both, 1.0, len(both)).logps[0][1]
    alone = score(model, both.rows(torch.tensor([1])).trimmed(), 1.0, 1).logps[0][0]
    difference = (padded - alone).abs().max()
    if difference > _ROUNDING:
        raise ValueError(
            f"{what} scores each row without the columns that other rows need, but the scores of {name} depend on how "
            f"far a row is padded: they differ by {difference:.2g} nats. Use a model that counts positions by its "
            "attention mask, or turn it off."
        )


def _try_derivatives(model: nn.Module, what: str) -> None:
    params, both = _some_parameters(model), _trial(model)
    direction = {name: torch.zeros_like(value) for name, value in params.items()}
    try:
        score(model, both, 1.0, len(both), params, direction, order=1)
    except (RuntimeError, NotImplementedError) as error:
        raise ValueError(
            f"{what} needs derivatives in forward mode, and a kernel of {type(base_model(model)).__name__} or of its "
            f"adapter has none ({one_line(error)[:120]}). Use kernels of torch (attn_implementation='eager', "
            "use_kernels=False, use_liger_kernel=False) or another adapter, or turn it off."
        ) from error


def _trial(model: nn.Module) -> Completions:
    """Two rows, of which the second has columns without a token."""
    vocabulary, device = base_model(model).config.get_text_config().vocab_size, next(model.parameters()).device
    ids = torch.arange(10, device=device).view(2, 5) % vocabulary
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    ones = torch.ones_like(ids[:, :2])
    return Completions(ids, mask, ones, torch.arange(2, device=ids.device), loss_mask=ones)


def _some_parameters(model: nn.Module) -> dict[str, torch.Tensor]:
    """Trainable parameters of `_MAX_TRIED` numbers together, the smallest first."""
    chosen: dict[str, torch.Tensor] = {}
    left = _MAX_TRIED
    trainable = [(name, param) for name, param in model.named_parameters() if param.requires_grad]
    for name, param in sorted(trainable, key=lambda one: one[1].numel()):
        left -= param.numel()
        if chosen and left < 0:
            break
        chosen[name] = param.detach()
    return chosen
