"""
Check a run before it starts: `trl-entropy doctor --config configs/quickstart.yaml [--any_field value]`.

It takes all settings of `trl-entropy train`, and the options below; or --trainer_factory, for a script of one's own.
It loads no weights, starts no other process, and writes no file.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import os
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

from transformers import TrainingArguments
from trl import SFTConfig

from trl_entropy.config.command_line import parse, parse_sft
from trl_entropy.config.dr_grpo import DrGRPOConfig
from trl_entropy.preflight import Plan, full_report
from trl_entropy.preflight.checks import findings
from trl_entropy.preflight.cost_report import size_lines
from trl_entropy.preflight.finding import Finding
from trl_entropy.preflight.fine_tuning import fine_tuning_findings, fine_tuning_report
from trl_entropy.preflight.hardware import Hardware, named_hardware, this_machine
from trl_entropy.preflight.launch import Launch, launch_from_options, read_accelerate_config
from trl_entropy.preflight.report import problem_lines, section, versions
from trl_entropy.preflight.shapes import ModelShape, found_shape, model_shape
from trl_entropy.runs import checkpoints
from trl_entropy.runs.console import quiet_libraries, saying_once
from trl_entropy.runs.counted import counted
from trl_entropy.runs.file_errors import ending_in_one_line

if TYPE_CHECKING:
    import torch

_Settings = tuple[Any, Any, Any]  # task, training arguments and model, of `trl-entropy train` or `trl-entropy sft`
_Run = tuple[_Settings, Callable[[], ModelShape]]


@ending_in_one_line()
@saying_once(checkpoints.__name__)
def main(argv: list[str] | None = None) -> None:
    """Print the report and every problem with its remedy; exit with status 1 if there is a problem."""
    quiet_libraries()
    options, settings = _options().parse_known_args(argv)
    report, found = diagnose(options, settings)
    print("\n".join(report))
    problems = sum(finding.is_problem for finding in found)
    print(
        "\n".join([f"{counted(problems, 'problem')}, {counted(len(found) - problems, 'note')}", *problem_lines(found)])
    )
    sys.exit(1 if problems else 0)


def _options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="trl-entropy doctor",
        description="Check a run before it starts. Takes all settings of `trl-entropy train` as well.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--accelerate_config", type=Path, help="the YAML file that `accelerate launch --config_file` will get")
    add("--num_processes", type=int, help="as for `accelerate launch`; replaces the number in the YAML file")
    add("--cpu", action="store_true", help="as for `accelerate launch`")
    add("--sft", action="store_true", help="check a run of `trl-entropy sft` instead of `trl-entropy train`")
    factory = (
        "path/to/script.py:function, which makes the trainer of a script of one's own: check its run. The script is "
        'imported, so that what starts training must stand under if __name__ == "__main__"; it is left where it makes '
        "the trainer, so that no model is loaded that it gives by name"
    )
    add("--trainer_factory", "--trainer-factory", help=factory)
    add("--hardware", help="the machine of the run if it is not this one, such as 2xH100-80GB or cpu-16GB")
    add(
        "--machines",
        type=int,
        help="The run has this many machines like that of --hardware, with one process for each GPU. The report then "
        "also has the time and the memory of models of 1.5, 7 and 32 billion parameters.",
    )
    return parser


def diagnose(options: argparse.Namespace, settings: list[str]) -> tuple[list[str], list[Finding]]:
    """The report on a run with these settings, and the problems and notes that were found."""
    try:
        _check_machines(options)
        hardware = named_hardware(options.hardware) if options.hardware else this_machine()
        launch = _launch(options, hardware)
    except (ValueError, OSError) as error:
        return section("Versions", versions()), [Finding(str(error), "Correct this option.")]
    found: list[Finding] = []
    if options.trainer_factory:
        planned_run = _of_script(options, settings, launch, hardware, found)
    else:
        planned_run = _parsed(parse_sft if options.sft else parse, settings, launch, hardware, found)
    if planned_run is None:
        return section("Versions", versions()), found
    (task, args, model), shape = planned_run
    if args.use_cpu and hardware.is_this_machine:
        hardware = this_machine(use_cpu=True)
    plan = Plan(task, args, model, launch, hardware, found_shape(shape, found, hardware.is_this_machine))
    if options.sft:
        return fine_tuning_report(plan), found + fine_tuning_findings(plan)
    sizes = section("Other sizes on this hardware", size_lines(plan)) if options.machines else []
    return full_report(plan) + sizes, found + findings(plan)


def _check_machines(options: argparse.Namespace) -> None:
    if options.machines is None:
        return
    if options.machines < 1:
        raise ValueError(f"--machines is {options.machines}; use 1 or more.")
    if not options.hardware:
        raise ValueError("--machines says how many machines like that of --hardware there are; give --hardware too.")


def _launch(options: argparse.Namespace, hardware: Hardware) -> Launch:
    if options.machines:
        return _launch_on_machines(options, hardware)
    if options.accelerate_config:
        return read_accelerate_config(options.accelerate_config, options.num_processes, options.cpu)
    # Without options for the launcher: one process on this machine, one per GPU on a machine given by --hardware.
    devices = 1 if hardware.is_this_machine and options.num_processes is None else hardware.num_devices
    return launch_from_options(devices, options.num_processes, options.cpu)


def _launch_on_machines(options: argparse.Namespace, hardware: Hardware) -> Launch:
    """One process for each GPU of all machines, unless --num_processes says how many; the engine is the file's."""
    number = options.num_processes or max(1, hardware.num_devices) * options.machines
    if options.accelerate_config:
        launch = read_accelerate_config(options.accelerate_config, number, options.cpu)
    else:
        launch = launch_from_options(number, number, options.cpu)
    return dataclasses.replace(launch, num_machines=min(options.machines, launch.num_processes))


def _parsed(
    read: Callable[[list[str]], _Settings],
    settings: list[str],
    launch: Launch,
    hardware: Hardware,
    found: list[Finding],
) -> _Run | None:
    """The run of these settings, or None; errors in them are added to `found`."""
    with planned(launch, hardware):
        try:
            task, args, model = read(settings)
            return (task, args, model), functools.partial(model_shape, model)
        except (ValueError, ImportError) as error:
            found.append(Finding(str(error), _advice(error, hardware)))
        # An output_dir that is in use must not hide other problems: read the settings as if the run were resumed.
        try:
            task, args, model = read([*settings, "--resume_from_checkpoint", "unset"])
        except (ValueError, ImportError):
            return None  # said above
        args.resume_from_checkpoint = None
        return (task, args, model), functools.partial(model_shape, model)


def _advice(error: Exception, hardware: Hardware) -> str:
    """What to do about an error that may be one of this machine only; otherwise the error says it itself."""
    if "bf16" in str(error) and not hardware.has_gpu:
        return "To check another machine's run, name it: --hardware 2xH100-80GB."
    return ""


def _of_script(
    options: argparse.Namespace, settings: list[str], launch: Launch, hardware: Hardware, found: list[Finding]
) -> _Run | None:
    """The run of a script, or None; what is wrong with it is added to `found`."""
    from trl_entropy.preflight.script import planned_script

    if settings or options.sft:
        asked = " ".join(settings) or "--sft"
        found.append(Finding(f"--trainer_factory takes the settings from the script, but there is {asked} too."))
        return None
    with planned(launch, hardware):
        try:
            script = planned_script(options.trainer_factory)
        except (ValueError, ImportError) as error:
            found.append(Finding(str(error), _advice(error, hardware)))
            return None
    found += script.findings()
    return (script.task, script.args, script.model), script.shape


@contextlib.contextmanager
def planned(launch: Launch, hardware: Hardware) -> Iterator[None]:
    """
    Inside, `DrGRPOConfig` and `SFTConfig` see the processes and the device of the planned run, not of this process.

    transformers sets up the devices in `_setup_devices`, which would wait for the other processes, and looks for bf16
    on the GPU of this machine.
    """

    def setup_devices(self: TrainingArguments) -> torch.device:
        import torch

        self.distributed_state = types.SimpleNamespace(num_processes=launch.num_processes, process_index=0)
        self._n_gpu = 0 if self.use_cpu else min(1, hardware.num_devices)
        return torch.device("cpu")

    with contextlib.ExitStack() as stack:
        for config in (DrGRPOConfig, SFTConfig):
            stack.enter_context(mock.patch.object(config, "_setup_devices", property(setup_devices)))
        stack.enter_context(mock.patch.dict(os.environ, {"WORLD_SIZE": str(launch.num_processes)}))
        if not hardware.is_this_machine:
            known = mock.Mock(return_value=hardware.has_gpu)
            stack.enter_context(mock.patch("transformers.training_args.is_torch_bf16_gpu_available", known))
        yield


if __name__ == "__main__":
    main()
