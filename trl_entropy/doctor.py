"""
Check a run before it starts: `trl-entropy doctor --config configs/quickstart.yaml [--any_field value]`.

Takes what `trl_entropy.train` takes, and the options below. Loads no weights, starts no process, writes nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from transformers import TrainingArguments
from trl import SFTConfig

from trl_entropy import sft
from trl_entropy.config.command_line import parse
from trl_entropy.config.dr_grpo import DrGRPOConfig
from trl_entropy.preflight import Plan, full_report
from trl_entropy.preflight.checks import findings
from trl_entropy.preflight.finding import Finding
from trl_entropy.preflight.fine_tuning import fine_tuning_findings, fine_tuning_report
from trl_entropy.preflight.hardware import Hardware, named_hardware, this_machine
from trl_entropy.preflight.launch import Launch, launch_from_options, read_accelerate_config
from trl_entropy.preflight.report import problem_lines, section, versions
from trl_entropy.preflight.shapes import ModelShape, UnknownShape, model_shape
from trl_entropy.runs.console import quiet_libraries


def main(argv: list[str] | None = None) -> None:
    """Print the report and every problem with its remedy; exit with status 1 if there is one."""
    quiet_libraries()
    options, settings = _options().parse_known_args(argv)
    report, found = diagnose(options, settings)
    print("\n".join(report))
    problems = sum(finding.is_problem for finding in found)
    print("\n".join([f"{problems} problem(s), {len(found) - problems} note(s)", *problem_lines(found)]))
    sys.exit(1 if problems else 0)


def _options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="trl-entropy doctor",
        description="Check a run before it starts. All settings of `trl-entropy train` can be given too.",
        allow_abbrev=False,
    )
    parser.add_argument("--accelerate_config", type=Path, help="the YAML that `accelerate launch --config_file` gets")
    parser.add_argument("--num_processes", type=int, help="as given to `accelerate launch`, over the YAML's")
    parser.add_argument("--cpu", action="store_true", help="as given to `accelerate launch`")
    parser.add_argument("--sft", action="store_true", help="the settings are those of `trl-entropy sft`")
    parser.add_argument("--hardware", help="the machine that it will run on, if not this one: 2xH100-80GB, cpu-16GB")
    return parser


def diagnose(options: argparse.Namespace, settings: list[str]) -> tuple[list[str], list[Finding]]:
    """The report of a run's settings, and what was found."""
    try:
        hardware = named_hardware(options.hardware) if options.hardware else this_machine()
        launch = _launch(options, hardware)
    except (ValueError, FileNotFoundError) as error:
        return section("Versions", versions()), [Finding(str(error), "Correct the option.")]
    found: list[Finding] = []
    parsed = _parsed(sft.parse if options.sft else parse, settings, launch, hardware, found)
    if parsed is None:
        return section("Versions", versions()), found
    task, args, model = parsed
    if args.use_cpu and hardware.is_this_machine:
        hardware = this_machine(use_cpu=True)
    plan = Plan(task, args, model, launch, hardware, _shape(model, hardware, found))
    if options.sft:
        return fine_tuning_report(plan), found + fine_tuning_findings(plan)
    return full_report(plan), found + findings(plan)


def _launch(options: argparse.Namespace, hardware: Hardware) -> Launch:
    if options.accelerate_config:
        return read_accelerate_config(options.accelerate_config, options.num_processes, options.cpu)
    # Without a launcher's options this machine runs one process; a machine that is named runs one a GPU.
    devices = 1 if hardware.is_this_machine and options.num_processes is None else hardware.num_devices
    return launch_from_options(devices, options.num_processes, options.cpu)


def _parsed(
    read: Callable[[list[str]], Any], settings: list[str], launch: Launch, hardware: Hardware, found: list[Finding]
) -> Any:
    """(task, args, model), or None; errors in the settings become problems."""
    with planned(launch, hardware):
        try:
            return read(settings)
        except (ValueError, ImportError, FileNotFoundError) as error:
            found.append(Finding(str(error), _advice(error, hardware)))
        # A directory that is in use hides nothing else: go on as if its run were to be resumed.
        try:
            task, args, model = read([*settings, "--resume_from_checkpoint", "unset"])
        except (ValueError, ImportError, FileNotFoundError):
            return None  # said above
        args.resume_from_checkpoint = None
        return task, args, model


def _advice(error: Exception, hardware: Hardware) -> str:
    """For errors that are not ours; those of `DrGRPOConfig` and `parse` say themselves what to do."""
    if "bf16" in str(error) and not hardware.has_gpu:
        return "Set bf16: false and use_cpu: true; check another machine's run with --hardware 2xH100-80GB."
    return "Correct the path of --config." if isinstance(error, FileNotFoundError) else ""


def _shape(model: Any, hardware: Hardware, found: list[Finding]) -> ModelShape | None:
    try:
        return model_shape(model)
    except UnknownShape as error:
        advice = (
            "For an estimate name its base: --model_name_or_path Qwen/Qwen2.5-1.5B, for an adapter with --use_peft."
        )
        found.append(Finding(str(error), advice, is_problem=hardware.is_this_machine))
    except ValueError as error:
        found.append(Finding(f"the model cannot be built as the settings say: {error}"))
    return None


@contextlib.contextmanager
def planned(launch: Launch, hardware: Hardware) -> Iterator[None]:
    """
    Inside, `DrGRPOConfig` and `SFTConfig` see the processes and the device of the plan, not those of this process.

    transformers sets devices up in `_setup_devices`, which would wait for processes that nobody starts, and asks the
    GPU that is here whether it knows bf16.
    """

    def setup_devices(self: TrainingArguments) -> Any:
        import torch

        self.distributed_state = types.SimpleNamespace(num_processes=launch.num_processes, process_index=0)
        self._n_gpu = 0 if self.use_cpu else min(1, hardware.num_devices)
        return torch.device("cpu")

    patches: list[Any] = [
        *(
            mock.patch.object(config, "_setup_devices", property(setup_devices))
            for config in (DrGRPOConfig, SFTConfig)
        ),
        mock.patch.dict(os.environ, {"WORLD_SIZE": str(launch.num_processes)}),
    ]
    if not hardware.is_this_machine:
        known = mock.Mock(return_value=hardware.has_gpu)
        patches.append(mock.patch("transformers.training_args.is_torch_bf16_gpu_available", known))
    with contextlib.ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        yield


if __name__ == "__main__":
    main()
