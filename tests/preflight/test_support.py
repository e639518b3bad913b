"""The support table against what the code really refuses, and what really runs."""

import contextlib
import sys
from pathlib import Path

import pytest
import torch
from accelerate.utils import DistributedType
from torch import nn

from trl_entropy import DrGRPOConfig
from trl_entropy.config.command_line import parse
from trl_entropy.engine import snapshot_parameters, swapped_parameters
from trl_entropy.engine.build import _refuse_common, _refuse_deepspeed, _refuse_fsdp
from trl_entropy.preflight import support
from trl_entropy.preflight.hardware import this_machine
from trl_entropy.preflight.launch import launch_from_options
from trl_entropy.preflight.plan import Plan
from trl_entropy.preflight.report import _support, fold
from trl_entropy.preflight.shapes import model_shape
from trl_entropy.probes import PROBES
from trl_entropy.probes.probe import Probe
from trl_entropy.probes.rollout_entropy import RolloutEntropyProbe

sys.path.insert(0, str(Path(__file__).parents[1] / "engine"))  # the engine's tests have the stand-ins
from test_engine_refusals import fake_accelerator, fake_deepspeed, fsdp_state


def refusal(is_supported: bool):
    """What supported code is run in, and what refused code must end with; torch's own errors are RuntimeErrors."""
    return contextlib.nullcontext() if is_supported else pytest.raises((NotImplementedError, ValueError, RuntimeError))


SHARDED = {"megatron": "MEGATRON_LM", "xla": "XLA"}


def test_every_toggle_has_a_row():
    toggles = {name for name in DrGRPOConfig.__dataclass_fields__ if name.endswith("_probe")}
    assert toggles <= set(support.DEPENDS_ON)


def test_probes_that_read_updates_depend_on_the_engine():
    kinds: dict[str, type[Probe]] = {**PROBES, "entropy_probe (rollouts)": RolloutEntropyProbe}
    for name, kind in kinds.items():
        watches = (kind.on_before_update, kind.on_after_update) != (Probe.on_before_update, Probe.on_after_update)
        assert ("engine" in support.DEPENDS_ON[name]) == watches


@pytest.mark.parametrize("engine", support.ENGINES)
def test_engines_are_refused_as_build_engine_does(engine):
    supported = engine in ("plain", "ddp", "zero1", "zero2", "zero3", "fsdp2")
    with refusal(supported):
        if engine.startswith("zero"):
            _refuse_deepspeed(fake_deepspeed(zero_optimization_stage=int(engine[-1])))
        if engine.startswith("fsdp"):
            _refuse_fsdp(fake_accelerator(state=fsdp_state(fsdp_version=int(engine[-1]))))
        kind = DistributedType(SHARDED.get(engine, "NO"))
        _refuse_common(fake_accelerator(distributed_type=kind), nn.Linear(1, 1), torch.optim.AdamW([torch.ones(1)]))
    assert (support.ENGINES[engine] is None) == supported
    assert support.cell("effective_sample_size_probe", engine, "sdpa", "none") == "supported"


@pytest.mark.parametrize("quantisation", support.QUANTISATIONS)
def test_quantised_base_is_refused_by_float32_scoring_alone(quantisation):
    """bitsandbytes keeps quantised weights as int8 (8 bits) and uint8 (4 bits)."""
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    dtype = {"none": torch.bfloat16, "8bit": torch.int8, "4bit": torch.uint8}[quantisation]
    model[0].weight = nn.Parameter(torch.ones(2, 2, dtype=dtype), requires_grad=False)
    values = {"1.weight": torch.ones(2, 2)}
    with refusal(support.QUANTISATIONS[quantisation] is None), swapped_parameters(model, values, torch.float32):
        pass
    with swapped_parameters(model, values):  # what kl_every does
        assert support.cell("kl_every", "plain", "sdpa", quantisation) == "supported"


def test_kl_refuses_parameters_that_are_not_whole():
    model = nn.Linear(2, 2, bias=False)
    model.weight.ds_id = 0
    with pytest.raises(ValueError, match="ZeRO-3"), swapped_parameters(model, {"weight": torch.ones(2, 2)}):
        pass
    with pytest.raises(ValueError, match="ZeRO-3"):
        snapshot_parameters(model)
    assert "zero_stage: 2" in support.remedy("kl_every", "engine", "zero3")


def test_a_cell_names_everything_that_must_change():
    text = support.cell("entropy_probe", "zero0", "flash_attention_2", "4bit")
    assert all(part in text for part in ("refused: ", "zero_stage: 2", "bfloat16"))
    assert support.cell("entropy_probe", "zero2", "kernels-community/flash-attn", "none") == "supported"
    assert support.cell("entropy_probe", "zero2", "sdpa", "none") == "supported"
    assert support.cell("a_new_probe", "zero0", "sdpa", "none").startswith("refused")  # unknown: the strictest row


def test_the_table_fits_into_the_width_of_the_report(tmp_path):
    task, args, model = parse(
        ["--config", str(Path(__file__).parents[2] / "configs/quickstart.yaml"), "--output_dir", str(tmp_path)]
    )
    plan = Plan(task, args, model, launch_from_options(1, None, True), this_machine(use_cpu=True), model_shape(model))
    lines = _support(plan)
    assert len(lines) == len(support.DEPENDS_ON) + 2 and all(fold(line) == [f"  {line}"] for line in lines)
