"""A planned run as text: the sections of `trl-entropy doctor`, and the summary at the start of training."""

from __future__ import annotations

import functools
import textwrap
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from trl_entropy.preflight import estimate, support
from trl_entropy.preflight.checks import findings, remedy_for_memory
from trl_entropy.preflight.cost_report import cost_lines
from trl_entropy.preflight.disk import disk, waits_for_evaluation
from trl_entropy.preflight.files import first_rows, resumed_checkpoint
from trl_entropy.preflight.finding import Finding
from trl_entropy.preflight.hardware import GIB, this_machine
from trl_entropy.preflight.launch import launch_from_environment
from trl_entropy.preflight.plan import Plan
from trl_entropy.preflight.shapes import found_shape, model_shape
from trl_entropy.runs.checkpoints import CheckpointError, checkpoints_of
from trl_entropy.runs.counted import counted
from trl_entropy.runs.directory import RunDirectory
from trl_entropy.runs.file_errors import free_bytes
from trl_entropy.tasks.completion_functions import metric_functions, reward_functions, tried
from trl_entropy.tasks.registry import task_of

if TYPE_CHECKING:
    from trl import ModelConfig

    from trl_entropy.config.dr_grpo import DrGRPOConfig
    from trl_entropy.tasks.arguments import TaskArguments

WIDTH = 100
_PACKAGES = ("trl_entropy", "torch", "trl", "transformers", "accelerate", "peft", "deepspeed", "bitsandbytes", "vllm")


def short_report(task: TaskArguments, args: DrGRPOConfig, model: ModelConfig) -> tuple[list[str], list[Finding]]:
    """
    A summary of the run that is about to start, batches and memory, and what doctor finds in it.

    It stops nothing. Call it with what `parse` returned, before the model is loaded.
    """
    found: list[Finding] = []
    plan = _plan_here(task, args, model, found)
    lines = [_batch_line(plan)] + ([_memory_line(plan)] if plan.shape is not None else [])
    return lines, found + findings(plan, reads_data=False)


def memory_remedy(task: TaskArguments, args: DrGRPOConfig, model: ModelConfig) -> str:
    """What to do where memory ran out, as doctor says it of a run that needs more than there is."""
    plan = _plan_here(task, args, model, [])
    return remedy_for_memory("loss and backward" if plan.shape is None else estimate.estimate(plan).peak_phase)


def _plan_here(task: TaskArguments, args: DrGRPOConfig, model: ModelConfig, found: list[Finding]) -> Plan:
    """The run as it starts in this process; what is wrong with its model is added to `found`."""
    shape = found_shape(functools.partial(model_shape, model), found)
    return Plan(task, args, model, launch_from_environment(args.world_size), this_machine(args.use_cpu), shape)


def full_report(plan: Plan) -> list[str]:
    """All sections of the report except the problems, in lines of at most 100 columns."""
    sections = {
        "Versions": versions(),
        "Machine and processes": machine_lines(plan),
        "Batch plan": _batches(plan),
        "Rewards and metrics": _functions(plan),
        "Memory of a process, GiB": _memory(plan),
        "Time of a step": cost_lines(plan),
        "Disk": _disk(plan),
        "Probes: what they support": _support(plan),
        "Resuming": _resuming(plan),
    }
    return [line for title, lines in sections.items() for line in section(title, lines)]


def section(title: str, lines: list[str]) -> list[str]:
    """A title and its lines, indented and wrapped."""
    return [title, *(part for line in lines for part in fold(line)), ""]


def fold(line: str, indent: str = "  ") -> list[str]:
    """`line` wrapped at 100 columns; a line that fits is not changed."""
    if len(indent + line) <= WIDTH:
        return [indent + line]
    return textwrap.wrap(line, WIDTH, initial_indent=indent, subsequent_indent=indent + "  ")


def problem_lines(found: list[Finding]) -> list[str]:
    """The problems and notes, each with its remedy on a line below it."""
    lines: list[str] = []
    for finding in found:
        lines += fold(f"{'PROBLEM' if finding.is_problem else 'note   '}  {finding.text}")
        if finding.remedy:
            lines += fold(f"-> {finding.remedy}", indent=" " * 11)
    return lines


# ---- sections


def versions() -> list[str]:
    found = [f"{name} {_version(name)}" for name in _PACKAGES]
    return [", ".join(found)]


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def machine_lines(plan: Plan) -> list[str]:
    launch = plan.launch
    machines = f" on {launch.num_machines} machines" if launch.num_machines > 1 else ""
    return [
        f"{plan.hardware}; torch {torch.__version__} sees {counted(torch.cuda.device_count(), 'GPU')} here",
        f"{counted(launch.num_processes, 'process')}{machines}, engine {launch.engine} ({launch.source})",
        f"model {plan.model.model_name_or_path}: {_model_line(plan)}",
    ]


def _model_line(plan: Plan) -> str:
    shape = plan.shape
    if shape is None:
        return "shape unknown"
    adapter = f", adapter {shape.num_adapter:,}" if shape.num_adapter else ""
    return (
        f"{shape.num_parameters:,} parameters{adapter}, {shape.num_trainable:,} trainable; shape: {shape.source}; "
        f"dtype {plan.model.dtype}, attention {plan.attention}, quantisation {plan.quantisation}"
    )


def _functions(plan: Plan) -> list[str]:
    """What each function returns for completions of the first rows that are made up, and how long it takes."""
    functions = reward_functions(plan.task) + metric_functions(plan.task)
    models = [f"{one.short}: a reward model, which is not tried here" for one in functions if one.is_model]
    try:
        trials = tried(functions, first_rows(plan))
    except (ValueError, OSError):  # which is a finding
        return [f"not tried: {', '.join(one.short for one in functions)}"]
    return [
        f"{trial.function.kind} {trial.function.name}: "
        f"{', '.join(f'{value:.3g}' for value in trial.values)} for an empty completion, one without an answer, one "
        f"with the right answer in its tags; {1000 * trial.seconds:.2g} ms a completion"
        for trial in trials
    ] + models


def _batches(plan: Plan) -> list[str]:
    args = plan.args
    assumed = "at most" if task_of(plan.task).longest_prompt(plan.task) else "an assumed"
    evaluation = [
        f"evaluation: {counted(plan.task.num_eval_problems, 'problem')} x "
        f"{args.num_generations_eval or args.num_generations} "
        f"completions, {args.per_device_eval_batch_size} at a time on each process"
    ]
    at_once = args.per_device_train_batch_size * args.steps_per_generation
    derived = "" if args.max_steps > 0 else " (from num_train_epochs and num_train_problems)"
    return [
        _batch_line(plan),
        f"a process generates {counted(at_once, 'completion')} at once; "
        f"prompts of {assumed} {counted(plan.prompt_length, 'token')}, completions of at most "
        f"{args.max_completion_length}",
        f"{counted(plan.num_steps, 'step')}{derived}",
        *(evaluation if args.eval_strategy != "no" else []),
    ]


def _batch_line(plan: Plan) -> str:
    args = plan.args
    return (
        f"a step: {counted(plan.prompts_per_step, 'prompt')} x {args.num_generations} completions = "
        f"{plan.completions_per_step}, as {counted(plan.world_size, 'process')} x "
        f"{counted(args.gradient_accumulation_steps, 'micro-batch')} of {args.per_device_train_batch_size}"
    )


def _memory_line(plan: Plan) -> str:
    needed = estimate.estimate(plan)
    available = plan.hardware.memory_per_process(plan.launch.num_local_processes)
    return (
        f"memory: about {needed.peak / GIB:.1f} GiB a process at the peak ({needed.peak_phase}; an estimate), of "
        f"{available / GIB:.1f} GiB; engine {plan.engine}"
    )


def _memory(plan: Plan) -> list[str]:
    if plan.shape is None:
        return ["not estimated: the model's shape is unknown"]
    estimates = estimate.estimates_by_engine(plan)
    if plan.engine in estimates:
        estimates[plan.engine] = estimate.estimate(plan)
    world_size = max(2, plan.world_size)
    headers = [f"{'*' if engine == plan.engine else ''}{engine}" for engine in estimates]
    lines = [f"{'':<36}" + "".join(f"{header:>10}" for header in headers)]
    columns = list(estimates.values())
    lines += _rows("always", [column.always for column in columns])
    for phase in columns[0].phases:
        lines += _rows(phase, [column.phases[phase] for column in columns])
    lines.append(_row("PEAK: always + the largest phase", [column.peak for column in columns]))
    if any(column.on_machine for column in columns):
        lines.append(_row("main memory that a machine shares", [column.on_machine for column in columns]))
    return [
        *lines,
        f"* is this run. plain has 1 process, the others {world_size}. Phases follow one another: the largest counts.",
        "(estimate): within a factor of 1.5 for tiny models on a CPU. Logits and buffers are taken from the code of",
        "the libraries and were not measured. CUDA takes 1-2 GiB more.",
    ]


def _rows(title: str, columns: list[dict[str, int]]) -> list[str]:
    names = dict.fromkeys(name for column in columns for name in column)
    return [f"{title}:"] + [_row(f"  {name}", [column.get(name, 0) for column in columns]) for name in names]


def _row(name: str, sizes: list[int]) -> str:
    return f"{name:<36}" + "".join(f"{_gib(size):>10}" for size in sizes)


def _gib(size: int) -> str:
    return "-" if not size else f"{size / GIB:.2f}" if size >= 0.005 * GIB else "< 0.01"


def _disk(plan: Plan) -> list[str]:
    if plan.shape is None:
        return ["not estimated: the model's shape is unknown", *free_space(plan)]
    found, args = disk(plan), plan.args
    waits = ", but each stays until it is evaluated in the background" if waits_for_evaluation(plan) else ""
    checkpoints, tables, evaluated = found.checkpoints, found.completions, found.evaluations
    probed = max((files.at_end for files in found.probes.values()), default=0)
    return [
        f"checkpoints: {'at most ' if waits else ''}{checkpoints.at_most} x {_size(checkpoints.each)} = "
        f"{_size(checkpoints.each * checkpoints.at_most)} "
        f"(save_strategy {getattr(args.save_strategy, 'value', args.save_strategy)}, "
        f"save_total_limit {args.save_total_limit}{waits})",
        f"probe files: {_size(found.probes_at_end)} of {probed} steps, at most {_size(found.probes_at_most)} "
        f"meanwhile (probe_files_keep {args.probe_files_keep})",
        f"completions: {_size(tables.each * tables.at_end + evaluated.each * evaluated.at_end)} of {tables.at_end} "
        f"steps and {evaluated.at_end} evaluations, a guess "
        f"(completions_files_keep {args.completions_files_keep})",
        f"metrics.jsonl and TensorBoard: {_size(found.logs)}",
        f"all: {_size(found.at_end)} at the end, at most {_size(found.at_most)} meanwhile; completions of full length",
        *free_space(plan),
    ]


def _size(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.2f} GiB" if num_bytes >= GIB / 10 else f"{num_bytes / 2**20:.2f} MiB"


def free_space(plan: Plan) -> list[str]:
    """A line on the disk of the run directory, if that is on this machine."""
    if not plan.hardware.is_this_machine:
        return []
    free = free_bytes(Path(plan.args.output_dir))
    return [f"free: {free / GIB:.2f} GiB at {plan.args.output_dir}"]


def _support(plan: Plan) -> list[str]:
    """A row for each probe, a column for each engine, attention and quantisation; `*` marks those of this run."""
    ours = {plan.engine, plan.attention, plan.quantisation}
    values = [(axis, value) for axis, options in support.AXES.items() for value in options]
    rare = {"zero0", "fsdp1", "megatron", "xla", "flex_attention", "8bit"} - ours
    values = [(axis, value) for axis, value in values if value not in rare]
    short = {"flash_attention_2": "flash", "flex_attention": "flex"}
    enabled = support.probe_names(plan)
    headers = [f"{'*' if value in ours else ''}{short.get(value, value)}" for _, value in values]
    lines = [" " * 28 + "".join(f"{header:>6}" for header in headers)]
    for probe in dict.fromkeys([*support.DEPENDS_ON, *enabled]):
        cells = ["no" if support.remedy(probe, axis, value) else "yes" for axis, value in values]
        lines.append(f"{'*' if probe in enabled else ' '}{probe:<27}" + "".join(f"{cell:>6}" for cell in cells))
    return [
        *lines,
        "* is used in this run. A probe needs a yes for the engine, the attention and the quantisation.",
    ]


def _resuming(plan: Plan) -> list[str]:
    folder = plan.args.output_dir
    try:
        found = resumed_checkpoint(plan)
    except CheckpointError:
        return [f"not possible from {plan.args.resume_from_checkpoint}, see the problems below"]
    if found is not None:
        return [f"from {found}"]
    rows = RunDirectory(folder).metrics()
    there = f"{folder} holds a run of {counted(rows[-1]['step'], 'step')}" if rows else f"{folder} holds no run"
    newest = checkpoints_of(Path(folder))[:1]
    return [f"no, the run starts from the beginning; {there}" + (f", newest checkpoint {newest[0]}" if newest else "")]
