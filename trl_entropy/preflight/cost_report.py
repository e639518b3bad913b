"""What a step and its probes cost, as sections of `trl-entropy doctor`: computed seconds, and other sizes."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import TYPE_CHECKING

from trl_entropy.config.setting import own_settings
from trl_entropy.preflight import estimate
from trl_entropy.preflight.cost import PRECISIONS, Cost, Item, cost
from trl_entropy.preflight.hardware import GIB, NETWORK, RATES, SHARE_OF_PEAK, Rates
from trl_entropy.preflight.plan import Plan
from trl_entropy.preflight.shapes import model_shape

if TYPE_CHECKING:
    from trl import ModelConfig

SIZES = ("Qwen/Qwen2.5-1.5B", "Qwen/Qwen2.5-7B", "Qwen/Qwen2.5-32B")
ASKED_RATIO = 1.15  # what a step with all probes at their cadence is to cost at most, relative to one without


def cost_lines(plan: Plan) -> list[str]:
    """A row for each phase of a step and each probe, and what all probes add; why not, where that is not known."""
    rates = plan.hardware.rates
    found = [cost(plan, precision) for precision in PRECISIONS]
    if rates is None or None in found:
        return [_why_unknown(plan, rates), *_passes_instead(plan)]
    costs: list[Cost] = [each for each in found if each is not None]
    step = _total(costs[0].phases, rates)
    mark = {True: "*", False: ""}
    chosen = chosen_precision(plan)
    names = [f"{mark[each.precision == chosen]}{each.precision}" for each in costs]
    lines = [_line("", "every", *(part for name in names for part in (f"{name}, s", "share")))]
    lines += [_line(item.name, "", *_cells(item, step, rates)) for item in costs[0].phases]
    lines += [_line("step", "1", f"{step:.3g}", "1.000")]
    for items in zip(*(each.probes for each in costs), strict=True):
        cells = [cell for item in items for cell in _cells(item, step, rates)]
        lines.append(_line(f"+ {items[0].name}", f"{items[0].every:g}", *cells))
    ratios = [ratio(each, rates) for each in costs]
    lines.append(
        _line("STEP WITH ALL PROBES", "", *(part for r in ratios for part in (f"{step * r:.3g}", f"{r:.3f}")))
    )
    return [*lines, *_notes(plan)]


def chosen_precision(plan: Plan) -> str:
    """That of the derivatives; `auto` counts as `tf32`, which it takes if the rounding is small enough."""
    return "float32" if getattr(plan.args, "probe_precision", "float32") == "float32" else "tf32"


def ratio(found: Cost, rates: Rates) -> float:
    """A step with the probes, each divided by its cadence, relative to the step without them."""
    return 1 + _total(found.probes, rates) / _total(found.phases, rates)


def _total(items: list[Item], rates: Rates) -> float:
    """Seconds of a step, those of rarer items divided by their cadence."""
    return sum(item.work.seconds(rates) / item.every for item in items)


def _cells(item: Item, step: float, rates: Rates) -> tuple[str, str]:
    seconds = item.work.seconds(rates)
    return f"{seconds:.3g}", f"{seconds / item.every / step:.3f}"


def _line(name: str, every: str, *cells: str) -> str:
    return f"{name:<38}{every:>6}" + "".join(f"{cell:>12}" for cell in cells)


def _notes(plan: Plan) -> list[str]:
    length, new = plan.sequence_length, plan.args.max_completion_length
    machines = f", {NETWORK / 1e9:.0f} GB/s between machines" if plan.launch.num_machines > 1 else ""
    return [
        f"Computed from FLOPs and bytes, not measured: full length ({length} tokens, {new} drawn), one process, at "
        f"{SHARE_OF_PEAK:.0%} of the data sheet's peak rates (an assumption{machines}). Seconds of a probe are those "
        "of a step in which it runs; its share is divided by its cadence. float32 and tf32 are the precision of the "
        "entropy probe's derivatives; * is that of this run. Launching kernels, rewards, files, checkpoints and "
        "evaluations are left out.",
    ]


def _why_unknown(plan: Plan, rates: Rates | None) -> str:
    if plan.shape is None:
        return "seconds are not known: the model's shape is unknown"
    if rates is None:
        known = ", ".join(f"{name}-{size}GB" for name, size in RATES)
        what = "it has no GPU" if not plan.hardware.has_gpu else f"its GPU is not in the table, which has {known}"
        return f"seconds are not known for {plan.hardware.name}: {what}"
    return "seconds are not known: how many products a mixture of experts makes depends on its tokens"


def _passes_instead(plan: Plan) -> list[str]:
    """What each probe and control costs in passes, as `docs/toggles.md` has it."""
    described = own_settings(plan.args)
    costs = {name: described[name].cost for name in plan.args.enabled_probes() if name in described}
    return [f"{name}: {text}" for name, text in costs.items() if text]


# ---- other sizes


def size_lines(plan: Plan) -> list[str]:
    """The same run with other models, with LoRA and without: seconds and memory of a process."""
    rates, precision = plan.hardware.rates, chosen_precision(plan)
    if rates is None:
        return [_why_unknown(plan, rates)]
    memory = plan.hardware.memory_per_process(plan.launch.num_local_processes) / GIB
    lines = [_size_line("", "step, s", "probes, s", "ratio", "peak, GiB", "zero3, GiB")]
    for name in SIZES:
        for lora in (True, False):
            model = _other_model(plan.model, name, lora)
            other = replace(plan, model=model, shape=model_shape(model))
            found = cost(other, precision)
            assert found is not None, "the built-in shapes are dense"
            step, probes = _total(found.phases, rates), _total(found.probes, rates)
            peaks = estimate.estimate(other).peak / GIB, estimate.estimates_by_engine(other)["zero3"].peak / GIB
            cells = (f"{step:.3g}", f"{probes:.3g}", f"{1 + probes / step:.3f}", *(f"{peak:.0f}" for peak in peaks))
            lines.append(_size_line(f"{name.split('/')[-1]}, {'LoRA' if lora else 'full'}", *cells))
    return [
        *lines,
        f"Computed, not measured: seconds of a step, and of all probes divided by their cadence ({precision}); peak "
        f"memory of a process under {plan.engine}, and under ZeRO-3, where {memory:.0f} GiB are there. "
        f"Settings, and the adapter's rank {plan.model.lora_r}, are those of this run.",
    ]


def _other_model(model: ModelConfig, name: str, lora: bool) -> ModelConfig:
    """The settings of a model with another name, and with an adapter of their rank or without."""
    other = copy.copy(model)
    other.model_name_or_path, other.use_peft = name, lora
    return other


def _size_line(name: str, *cells: str) -> str:
    return f"{name:<24}" + "".join(f"{cell:>12}" for cell in cells)
