"""The doctor's report on a supervised fine-tuning run. It does not estimate the memory."""

from __future__ import annotations

from trl_entropy.preflight.checks import devices, learning_rate, output_dir, processes
from trl_entropy.preflight.files import demonstrations, model_files
from trl_entropy.preflight.finding import Finding
from trl_entropy.preflight.plan import Plan
from trl_entropy.preflight.report import free_space, machine_lines, section, versions
from trl_entropy.runs.counted import counted


def fine_tuning_report(plan: Plan) -> list[str]:
    """Versions, machine and batch plan."""
    args = plan.args
    rows = args.per_device_train_batch_size * args.gradient_accumulation_steps * plan.world_size
    length = counted(args.num_train_epochs, "epoch") if args.max_steps <= 0 else counted(args.max_steps, "step")
    batches = [
        f"a step: {counted(rows, 'demonstration')}, as {counted(plan.world_size, 'process')} x "
        f"{counted(args.gradient_accumulation_steps, 'micro-batch')} of {args.per_device_train_batch_size}; {length}",
    ]
    sections = {"Versions": versions(), "Machine and processes": machine_lines(plan), "Batch plan": batches}
    sections |= {"Disk": free_space(plan)}
    return [line for title, lines in sections.items() for line in section(title, lines)]


def fine_tuning_findings(plan: Plan) -> list[Finding]:
    """The findings of the checks that do not depend on RL."""
    checks = (processes, devices, output_dir, learning_rate, model_files, demonstrations)
    return [finding for check in checks for finding in check(plan)]
