"""The checks of a planned run. Each yields the problems that it finds, with what to do about them."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from trl_entropy._versions import untested_versions
from trl_entropy.preflight import disk as files_of_run
from trl_entropy.preflight import estimate, support
from trl_entropy.preflight.files import dataset, model_files, positions, resume
from trl_entropy.preflight.finding import Finding, Findings
from trl_entropy.preflight.hardware import GIB
from trl_entropy.preflight.model import probed_model
from trl_entropy.preflight.plan import Plan
from trl_entropy.probes.fisher import check_memory, num_rows
from trl_entropy.probes.rollout_entropy import groups_that_fit
from trl_entropy.runs.counted import counted
from trl_entropy.runs.file_errors import LEAST_FREE, existing_parent, free_bytes


def findings(plan: Plan, reads_data: bool = True) -> list[Finding]:
    """
    The findings of all checks, problems first.

    Args:
        reads_data: whether the training data are read; they are not where training reads them next.
    """
    checks = [check for check in CHECKS if reads_data or check is not dataset]
    found = [finding for check in checks for finding in check(plan)]
    return sorted(found, key=lambda finding: not finding.is_problem)


# ---- processes and devices


def processes(plan: Plan) -> Findings:
    launch, hardware = plan.launch, plan.hardware
    if launch.num_asked > launch.num_processes:
        yield Finding(
            f"{launch.source} asks for {launch.num_asked} processes and starts ONE: accelerate ignores num_processes, "
            "without a message, for distributed_type MULTI_CPU and NO and for --cpu.",
            "Set distributed_type: MULTI_GPU, with use_cpu: true on a CPU (trl-entropy configs ddp-cpu); or "
            "num_processes: 1.",
        )
    if hardware.has_gpu and not launch.use_cpu and launch.num_local_processes > hardware.num_devices:
        yield Finding(
            f"There are {launch.num_local_processes} processes on a machine with "
            f"{counted(hardware.num_devices, 'GPU')}.",
            f"Set num_processes: {hardware.num_devices * launch.num_machines}.",
        )
    if launch.duplicates:
        yield Finding(
            f"DeepSpeed is configured twice: {launch.source} names a deepspeed_config_file and also sets "
            f"{', '.join(launch.duplicates)}.",
            "Remove these settings from the YAML file, or remove deepspeed_config_file, as the file of trl-entropy "
            "configs zero2 does.",
        )
    if plan.args.deepspeed and launch.zero_stage is not None and launch.source != "the environment":
        yield Finding(
            f"DeepSpeed is configured twice: by {launch.source} and by deepspeed={plan.args.deepspeed}.",
            "Remove the setting `deepspeed`; the YAML file of accelerate is enough.",
        )


def devices(plan: Plan) -> Findings:
    launch, args = plan.launch, plan.args
    if plan.hardware.has_gpu:
        if args.use_cpu:
            yield Finding("There is a GPU, but it is not used because of use_cpu: true.", is_problem=False)
        return
    if launch.use_cpu and not args.use_cpu:
        yield Finding("The launcher uses the CPU, but use_cpu is not set.", "Set use_cpu: true.")
    elif not args.use_cpu:
        yield Finding(
            "No GPU is here, and use_cpu is not set.",
            "Set use_cpu: true and bf16: false, and use the file of trl-entropy configs cpu; or name another machine "
            "with --hardware.",
        )
    elif not launch.use_cpu and launch.num_processes > 1:
        yield Finding(
            f"{launch.source} starts processes on GPUs, but no GPU is here.",
            "Use the file of trl-entropy configs ddp-cpu.",
        )


def packages(plan: Plan) -> Findings:
    """Optional packages; for another machine a missing one is only a note, as it may be installed there."""
    attention = str(plan.model.attn_implementation)
    report_to = plan.args.report_to if isinstance(plan.args.report_to, list) else [plan.args.report_to]
    needed = {
        "deepspeed": (plan.launch.zero_stage is not None, "pip install 'trl_entropy[deepspeed]'"),
        "vllm": (plan.args.use_vllm, "pip install 'trl_entropy[vllm]', or set use_vllm: false"),
        "bitsandbytes": (
            plan.quantisation != "none" or "bnb" in str(plan.args.optim) or "8bit" in str(plan.args.optim),
            "pip install bitsandbytes, or load the model in bfloat16 and use optim: adamw_torch_fused",
        ),
        "flash_attn": (
            attention.startswith("flash_attention"),
            "pip install flash-attn, or attn_implementation: sdpa",
        ),
        "liger_kernel": (plan.args.use_liger_kernel, "pip install liger-kernel, or set use_liger_kernel: false"),
        "wandb": ("wandb" in report_to, "pip install wandb, or set report_to: tensorboard"),
    }
    for package, (is_needed, remedy) in needed.items():
        if is_needed and importlib.util.find_spec(package) is None:
            text = f"The settings need the package {package}, which is not installed here."
            here = plan.hardware.is_this_machine
            yield Finding(text, f"Do: {remedy}.", is_problem=here, stops=here)
    known = {*INTEGRATION_TO_CALLBACK, "all", "none", "None"}
    for name in [str(one) for one in report_to if one not in known]:
        names = ", ".join(sorted(INTEGRATION_TO_CALLBACK))
        text = f"report_to has {name}, which transformers does not know."
        yield Finding(text, f"Use none, all, or some of {names}.", stops=True)
    if plan.launch.zero_stage is not None and not plan.hardware.has_gpu and shutil.which("c++") is None:
        yield Finding("On a CPU DeepSpeed compiles its communication, and there is no c++.", "Install a C++ compiler.")
    for message in untested_versions():
        yield Finding(f"{message}.", "Install the versions of constraints.txt.", is_problem=False)


# ---- what a probe or TRL will refuse


def refusals(plan: Plan) -> Findings:
    values = {"engine": plan.engine, "attention": plan.attention, "quantisation": plan.quantisation}
    for probe in support.probe_names(plan):
        for axis, value in values.items():
            if remedy := support.remedy(probe, axis, value):
                text = f"{probe} does not work with {axis} {value}."
                yield Finding(text, f"Turn the probe off, or {remedy}.", stops=True)
    readers = ", ".join(support.reads_updates(plan))
    if readers and (plan.args.fp16 or plan.launch.mixed_precision in ("fp16", "fp8")):
        text = f"{readers}: loss scaling changes gradients and skips steps."
        yield Finding(text, "Set bf16: true, fp16: false.", stops=True)
    if readers and plan.launch.offloads_optimizer:
        text = f"{readers}: the state of an offloaded optimizer cannot be read."
        yield Finding(text, "Set offload_optimizer_device: none.", stops=True)


def float32_values(plan: Plan) -> Findings:
    if estimate.trained_bytes(plan) == 2 and plan.launch.zero_stage is None:
        yield Finding(
            "The trained parameters are bf16 with no float32 copy: at small learning rates most updates are lost in "
            "rounding.",
            "Use ZeRO-2, which keeps such a copy, or set dtype: float32 with bf16: true and no quantisation.",
            is_problem=False,
        )


def rows_of_groups(plan: Plan) -> Findings:
    """The limits on the memory of gradients that probes check when training begins."""
    if plan.shape is None:
        return
    args, limit, groups = plan.args, estimate.rows_limit(plan), estimate.num_groups(plan)
    try:
        if args.entropy_probe and args.entropy_probe_completions == "rollouts":
            kept = groups_that_fit(groups, plan.world_size, plan.shape.module, limit)
            if kept < groups:
                text = f"entropy_probe_completions='rollouts' measures {kept} of a process's {groups} prompt groups."
                yield Finding(text, "A larger probe_rows_gib measures more of them.", is_problem=False)
    except ValueError as error:
        yield Finding(str(error), stops=True)
    try:
        if args.fisher_probe and not args.fisher_sketch_dim:
            check_memory(num_rows(args.fisher_num_sequences, args, plan.world_size), plan.shape.module, limit)
    except ValueError as error:
        yield Finding(str(error), stops=True)


def reentrant_checkpointing(plan: Plan) -> Findings:
    kwargs = plan.args.gradient_checkpointing_kwargs or {}
    reentrant = plan.args.gradient_checkpointing and kwargs.get("use_reentrant")
    if plan.engine == "ddp" and plan.has_adapter and reentrant and plan.args.gradient_accumulation_steps > 1:
        yield Finding(
            "DDP fails with LoRA, reentrant checkpointing and gradient accumulation together: a parameter is "
            "'marked ready only once'.",
            "Set gradient_checkpointing_kwargs: {use_reentrant: false}.",
        )


# ---- memory and disk


def memory(plan: Plan) -> Findings:
    if plan.shape is None:
        return
    needed = estimate.estimate(plan)
    available = plan.hardware.memory_per_process(plan.launch.num_local_processes)
    text = (
        f"A process needs about {needed.peak / GIB:.1f} GiB at its peak ({needed.peak_phase}) and has "
        f"{available / GIB:.1f} GiB."
    )
    if needed.peak > available:
        yield Finding(text, remedy_for_memory(needed.peak_phase))
    elif needed.peak > 0.8 * available:
        yield Finding(text, f"It may not fit: {remedy_for_memory(needed.peak_phase)}", is_problem=False)


def remedy_for_memory(phase: str) -> str:
    """What to do where `phase` needs more memory than there is."""
    smaller_model = "use LoRA (use_peft) or ZeRO-2"
    return {
        "generation": "Lower steps_per_generation (1 is the least) or max_completion_length, or set use_vllm.",
        "loss and backward": "Lower per_device_train_batch_size and keep num_prompts_per_step, set "
        f"gradient_checkpointing: true, or {smaller_model}.",
    }.get(phase, f"Lower probe_batch_size or probe_rows_gib, turn {phase} off, or {smaller_model}.")


def disk(plan: Plan) -> Findings:
    """Free space on the file system of the run directory, if that is on this machine."""
    if plan.shape is None or not plan.hardware.is_this_machine:
        return
    needed = files_of_run.disk(plan).at_most
    free = free_bytes(Path(plan.args.output_dir))
    if needed > free:
        waits = files_of_run.waits_for_evaluation(plan)
        take = "can take, if evaluation is slower than training," if waits else "will take"
        smaller = "evaluate_checkpoints=wait" if waits else "save_total_limit"
        yield Finding(
            f"The run's files {take} {_size(needed)}, but {_size(free)} are free at {plan.args.output_dir}.",
            f"Set {smaller}, raise save_steps, lower probe_files_keep, or choose another output_dir.",
        )


def _size(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.1f} GiB" if num_bytes >= GIB / 10 else f"{num_bytes / 2**20:.1f} MiB"


def output_dir(plan: Plan) -> Findings:
    """Whether the run directory can be written to, as far as that can be told without writing."""
    if not plan.hardware.is_this_machine:
        return
    there = existing_parent(Path(plan.args.output_dir))
    if not there.is_dir():
        text = f"output_dir is {plan.args.output_dir}, but {there} is a file."
        yield Finding(text, "Choose another output_dir.", stops=True)
    elif not os.access(there, os.W_OK | os.X_OK):
        text = f"Nothing can be written to {there}, for output_dir."
        yield Finding(text, "Choose another output_dir, or allow writing to this one.", stops=True)
    elif (free := free_bytes(there)) < LEAST_FREE:
        text = f"The disk of output_dir is full: {_size(free)} are left at {there}."
        yield Finding(text, "Make room on the disk.", stops=True)


def learning_rate(plan: Plan) -> Findings:
    if plan.args.learning_rate == 0:
        text = "learning_rate is 0: no step changes the policy, and every change of its entropy is 0."
        yield Finding(text, "Set a learning_rate above 0 to train.", is_problem=False)


CHECKS: tuple[Callable[[Plan], Findings], ...] = (
    processes,
    devices,
    packages,
    refusals,
    float32_values,
    rows_of_groups,
    reentrant_checkpointing,
    memory,
    disk,
    output_dir,
    learning_rate,
    model_files,
    probed_model,
    positions,
    dataset,
    resume,
)
