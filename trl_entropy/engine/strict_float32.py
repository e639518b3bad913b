"""Strict float32: contexts in which autocast and the TF32 modes of matrix products are off."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn


@contextmanager
def fp32_strict(model: nn.Module | None = None) -> Iterator[None]:
    """Scores in IEEE float32: autocast off, TF32 and bfloat16 matmuls off, whichever API had turned them on.

    `torch.set_float32_matmul_precision("high")` turns TF32 on whatever `allow_tf32` said before, and "medium" lets
    oneDNN multiply in bfloat16 on a CPU. The legacy switch and the new ones are set, and restored exactly, also when
    the body raises.

    Args:
        model (`torch.nn.Module`, *optional*):
            The model to be scored. Under mixed precision accelerate puts autocast *inside* `model.forward`, where no
            outer context reaches it; a model given here computes with its own forward, without autocast, meanwhile.
    """
    with ExitStack() as undo:
        undo.enter_context(autocast_off())
        undo.enter_context(_tf32_off())
        for module in model.modules() if model is not None else ():
            if "_original_forward" in vars(module):
                patched(undo, module, "forward", module._original_forward)
        yield


def patched(undo: ExitStack, module: nn.Module, name: str, value: object) -> None:
    """Sets an attribute of `module` until `undo` is closed."""
    if name in vars(module):
        undo.callback(setattr, module, name, vars(module)[name])
    else:
        undo.callback(delattr, module, name)
    setattr(module, name, value)


@contextmanager
def autocast_off() -> Iterator[None]:
    """Autocast off on the CPU and on the accelerator, if there is one."""
    accelerator = torch.accelerator.current_accelerator()
    with ExitStack() as undo:
        for device_type in sorted({"cpu", accelerator.type if accelerator is not None else "cpu"}):
            undo.enter_context(torch.autocast(device_type, enabled=False))
        yield


# (backend, operation) as torch resolves them: an operation that is unset takes its backend's value, then the generic.
# By torch._C, since `torch.backends.mkldnn.fp32_precision` reads its own knob and writes the generic one.
_FP32_PARENTS = (("generic", "all"), ("cuda", "all"), ("mkldnn", "all"))


_FP32_MATMULS = (("cuda", "matmul"), ("mkldnn", "matmul"))


_FP32_OTHERS = (("cuda", "conv"), ("cuda", "rnn"), ("mkldnn", "conv"), ("mkldnn", "rnn"))


@contextmanager
def _tf32_off() -> Iterator[None]:
    own: dict[tuple[str, str], str] = {}
    with ExitStack() as undo:
        # Runs last, since the legacy setter writes into the matmul knobs
        undo.callback(_write_fp32_knobs, own)
        for knob in (*_FP32_PARENTS, *_FP32_MATMULS):
            own[knob] = torch._C._get_fp32_precision_getter(*knob)
            # So that the next ones, and the legacy switch, show their own value and not this one
            torch._C._set_fp32_precision_setter(*knob, "none")
        # The legacy switch as well, since its getters raise where the two APIs disagree
        undo.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
        torch.set_float32_matmul_precision("highest")
        _write_fp32_knobs(dict.fromkeys(own, "ieee"))
        # cuDNN's start in a state that follows its parents and cannot be set again: touched only if set by someone
        for knob in _FP32_OTHERS:
            if (value := torch._C._get_fp32_precision_getter(*knob)) != "ieee":
                own[knob] = value
                torch._C._set_fp32_precision_setter(*knob, "ieee")
        yield


def _write_fp32_knobs(values: dict[tuple[str, str], str]) -> None:
    for knob, value in values.items():
        torch._C._set_fp32_precision_setter(*knob, value)
