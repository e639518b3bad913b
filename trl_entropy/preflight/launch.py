"""How a run is started: number of processes and engine, from a YAML file of accelerate or from the environment."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from trl_entropy.config.settings_file import one_line
from trl_entropy.runs.strict_json import Json

_ENGINES = {"MULTI_GPU": "ddp", "MEGATRON_LM": "megatron", "XLA": "xla"}
# accelerate refuses these beside a deepspeed_config_file: DeepSpeedPlugin._deepspeed_config_checks.
_DEEPSPEED_DUPLICATES = (
    "gradient_accumulation_steps",
    "gradient_clipping",
    "zero_stage",
    "offload_optimizer_device",
    "offload_param_device",
    "offload_param_nvme_path",
    "offload_optimizer_nvme_path",
    "zero3_save_16bit_model",
    "mixed_precision",
)


@dataclass(frozen=True)
class Launch:
    """
    The processes and the engine of a run.

    Attributes:
        engine: `plain` (one process), `ddp`, `zero0` to `zero3`, `fsdp1`, `fsdp2`, `megatron`, `xla`.
        num_processes: the processes that accelerate starts, on all machines together.
        num_asked: the processes that the settings ask for. With `MULTI_CPU` accelerate starts only one of them.
        source: where this was read from.
        duplicates: DeepSpeed settings that are given in two places.
        offloads_optimizer: whether DeepSpeed keeps the optimizer's state outside of the GPU.
    """

    engine: str
    num_processes: int
    num_asked: int
    source: str
    num_machines: int = 1
    use_cpu: bool = False
    mixed_precision: str = "no"
    offloads_optimizer: bool = False
    duplicates: list[str] = field(default_factory=list)

    @property
    def zero_stage(self) -> int | None:
        return int(self.engine[-1]) if self.engine.startswith("zero") else None

    @property
    def num_local_processes(self) -> int:
        return -(-self.num_processes // self.num_machines)


def read_accelerate_config(path: Path, num_processes: int | None = None, use_cpu: bool = False) -> Launch:
    """
    What `accelerate launch --config_file path [--num_processes N] [--cpu]` starts.

    Raises:
        ValueError: when the file is not a YAML file of accelerate.
    """
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no YAML: {one_line(error)}.") from error
    if not isinstance(settings, dict) or "distributed_type" not in settings:
        raise ValueError(f"{path} is not a YAML file of accelerate: distributed_type is missing.")
    asked = num_processes or int(settings.get("num_processes") or 1)
    kind = str(settings["distributed_type"]).upper()
    deepspeed = settings.get("deepspeed_config") or {}
    if kind == "FSDP":
        engine = f"fsdp{(settings.get('fsdp_config') or {}).get('fsdp_version', 1)}"
    else:
        engine = _engine(kind, _zero_stage(deepspeed, path.parent), asked)
    return Launch(
        engine=engine,
        num_processes=1 if engine == "plain" else asked,
        num_asked=asked,
        source=str(path),
        num_machines=int(settings.get("num_machines") or 1),
        use_cpu=use_cpu or bool(settings.get("use_cpu")),
        mixed_precision=str(settings.get("mixed_precision") or "no"),
        offloads_optimizer=deepspeed.get("offload_optimizer_device", "none") != "none",
        duplicates=_duplicates(settings, deepspeed),
    )


def launch_from_options(num_devices: int, num_processes: int | None, use_cpu: bool) -> Launch:
    """What starts without a YAML file: DDP over several GPUs, but with `--cpu` always one process."""
    asked = num_processes or max(1, num_devices)
    engine = "ddp" if asked > 1 and not use_cpu and num_devices > 1 else "plain"
    return Launch(engine, asked if engine == "ddp" else 1, asked, "no --accelerate_config", use_cpu=use_cpu)


def launch_from_environment(world_size: int, environ: Mapping[str, str] = os.environ) -> Launch:
    """How this process was started, from the variables that accelerate's launcher sets."""
    stage = environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
    version = environ.get("FSDP_VERSION", "1")
    flags = {f"zero{stage}": "ACCELERATE_USE_DEEPSPEED", f"fsdp{version}": "ACCELERATE_USE_FSDP"}
    engines = [engine for engine, flag in flags.items() if environ.get(flag, "false").lower() in ("1", "true")]
    return Launch(
        engine=engines[0] if engines else "ddp" if world_size > 1 else "plain",
        num_processes=world_size,
        num_asked=world_size,
        source="the environment",
        num_machines=max(1, world_size // int(environ.get("LOCAL_WORLD_SIZE", world_size))),
        use_cpu=environ.get("ACCELERATE_USE_CPU", "false").lower() == "true",
        mixed_precision=environ.get("ACCELERATE_MIXED_PRECISION", "no"),
        offloads_optimizer=environ.get("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", "none") != "none",
    )


def _engine(kind: str, zero_stage: int, num_processes: int) -> str:
    if kind == "DEEPSPEED":
        return f"zero{zero_stage}"
    if kind in ("NO", "MULTI_CPU") or (kind == "MULTI_GPU" and num_processes == 1):
        return "plain"  # accelerate ignores num_processes for MULTI_CPU
    return _ENGINES.get(kind, kind.lower())


def _zero_stage(deepspeed: Json, folder: Path) -> int:
    """The stage in the YAML file, or in the DeepSpeed file that it names (relative to here or to the YAML file)."""
    if name := deepspeed.get("deepspeed_config_file"):
        found = next((path for path in (Path(name), folder / name) if path.is_file()), None)
        if found is None:
            raise ValueError(f"deepspeed_config_file: there is no file {name}. Correct it, or set zero_stage.")
        return int(json.loads(found.read_text()).get("zero_optimization", {}).get("stage", 0))
    return int(deepspeed.get("zero_stage", 2))


def _duplicates(settings: Json, deepspeed: Json) -> list[str]:
    if "deepspeed_config_file" not in deepspeed:
        return []
    given = [*deepspeed, *(["mixed_precision"] if "mixed_precision" in settings else [])]
    return [name for name in given if name in _DEEPSPEED_DUPLICATES]
