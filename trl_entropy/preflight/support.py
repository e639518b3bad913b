"""
Which engines, kinds of attention and quantisations each probe supports. A test compares this table with what the code
refuses (`trl_entropy.engine.build_engine`, `swapped_parameters`, `score`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from trl_entropy.preflight.estimate import noise_scale_rows

if TYPE_CHECKING:
    from trl_entropy.preflight.plan import Plan

_USE_ZERO = "set zero_stage: 2 (or 1, 3)"
_USE_ZERO2 = "set zero_stage: 2 (or 1)"
_USE_DDP = "use distributed_type: MULTI_GPU (DDP) or DeepSpeed with zero_stage: 2"
_USE_FSDP2 = "set fsdp_version: 2"
_USE_BF16 = "load the base model with dtype: bfloat16 instead of quantised"

# Value -> what to set instead; None if it is supported.
ENGINES: dict[str, str | None] = {
    "plain": None,
    "ddp": None,
    "zero1": None,
    "zero2": None,
    "zero3": None,
    "fsdp2": None,
    "zero0": _USE_ZERO,
    "fsdp1": _USE_FSDP2,
    "megatron": _USE_DDP,
    "xla": _USE_DDP,
}
ATTENTIONS: dict[str, str | None] = {
    "eager": None,
    "sdpa": None,
    "flash_attention_2": None,  # probes score with sdpa instead, as with any kernel
    "flex_attention": None,
}
QUANTISATIONS: dict[str, str | None] = {"none": None, "8bit": _USE_BF16, "4bit": _USE_BF16}

AXES: dict[str, Mapping[str, str | None]] = {
    "engine": ENGINES,
    "attention": ATTENTIONS,
    "quantisation": QUANTISATIONS,
}

# Probe -> the axes on which its support depends. A probe that reads the update needs an engine that can be read; a
# probe that scores in float32 needs parameters with a float32 value, and an attention kernel for float32. `(extra)`:
# for halves, or with a trained head, the gradients come from a float32 pass of the probe, not from training.
DEPENDS_ON: dict[str, tuple[str, ...]] = {
    "entropy_probe": ("engine", "attention", "quantisation"),
    "entropy_probe (rollouts)": ("engine", "attention", "quantisation"),
    "entropy_attribution": ("engine", "attention", "quantisation"),
    "noise_scale_probe": ("engine",),
    "noise_scale_probe (extra)": ("engine", "attention", "quantisation"),
    "fisher_probe": ("engine", "attention", "quantisation"),
    "mutual_information_probe": ("engine", "attention", "quantisation"),
    "optimizer_state_probe": ("engine",),
    "effective_sample_size_probe": (),
    "kl_every": ("engine",),
}
# kl_every builds no engine, but it swaps parameters, which must be whole on every process.
KL_ENGINES: dict[str, str | None] = {**ENGINES, "zero0": None, "zero3": _USE_ZERO2, "fsdp2": _USE_DDP}
_EVERY_AXIS = tuple(AXES)


def remedy(probe: str, axis: str, value: str) -> str | None:
    """What to set instead if `probe` does not work with `value`; None if it does."""
    if axis not in DEPENDS_ON.get(probe, _EVERY_AXIS):
        return None
    if (probe, axis) == ("kl_every", "engine"):
        return KL_ENGINES.get(value, _USE_DDP)
    default = {"engine": _USE_DDP, "attention": None, "quantisation": _USE_BF16}[axis]
    return AXES[axis].get(value, default)


def cell(probe: str, engine: str, attention: str, quantisation: str) -> str:
    """`supported`, or `refused: ` and what to set instead."""
    values = {"engine": engine, "attention": attention, "quantisation": quantisation}
    remedies = [text for axis, value in values.items() if (text := remedy(probe, axis, value))]
    return f"refused: {', '.join(remedies)}" if remedies else "supported"


def probe_names(plan: Plan) -> list[str]:
    """The rows of the table that the plan turns on; a toggle that is not in the table keeps its name."""
    names = list(plan.args.enabled_probes())
    if plan.args.entropy_probe and plan.args.entropy_probe_completions == "rollouts":
        names[names.index("entropy_probe")] = "entropy_probe (rollouts)"
    from_groups = plan.args.noise_scale_probe and plan.args.noise_scale_from == "groups"
    # Their size is asked last: it needs the model's shape
    if from_groups and (plan.args.noise_scale_within_prompt or not plan.has_adapter or _exceeds_rows(plan)):
        names[names.index("noise_scale_probe")] = "noise_scale_probe (extra)"
    if plan.args.entropy_probe and plan.args.entropy_attribution != "none":
        names.append("entropy_attribution")
    return names + (["kl_every"] if plan.args.kl_every and plan.args.beta == 0 else [])


def _exceeds_rows(plan: Plan) -> bool:
    """Whether the groups' gradients are too large to be kept, so that the noise scale takes an extra pass."""
    return plan.shape is not None and not noise_scale_rows(plan)


def reads_updates(plan: Plan) -> list[str]:
    """The enabled probes that read the update, for which an engine is built."""
    return [name for name in probe_names(plan) if name != "kl_every" and "engine" in DEPENDS_ON.get(name, _EVERY_AXIS)]
