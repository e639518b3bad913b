"""
Evaluate the checkpoints of a run: `trl-entropy evaluate --run RUN`.

Each checkpoint is evaluated in a process of its own, which gives its memory back when it ends and whose failure does
not stop the others. A checkpoint that was evaluated before, with the same weights and settings, is skipped.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import sys
import time
from pathlib import Path

from trl_entropy.evaluation.plan import (
    ALL,
    PROFILES,
    TRANSFORMERS,
    VLLM,
    Job,
    Settings,
    Target,
    is_done,
    read_config,
    settings_of,
    targets_of,
)
from trl_entropy.evaluation.process import describe, run_job
from trl_entropy.runs.directory import RunDirectory
from trl_entropy.runs.file_errors import check_writable, ending_in_one_line
from trl_entropy.runs.strict_json import Json


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line; an invalid value ends the program with a message."""
    parser = _parser()
    args = parser.parse_args(argv)
    if args.subset_frac is not None and not 0 < args.subset_frac <= 1:
        parser.error(f"--subset-frac is {args.subset_frac}; it must be above 0 and at most 1")
    for name in ("num_samples", "batch_size", "timeout"):
        if getattr(args, name) is not None and getattr(args, name) <= 0:
            parser.error(f"--{name.replace('_', '-')} is {getattr(args, name)}; it must be positive")
    if args.sampler == VLLM and not _is_installed(VLLM):
        parser.error("--sampler is vllm, which is not installed: pip install 'trl_entropy[vllm]'")
    return args


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="trl-entropy evaluate", description="Evaluate the checkpoints of a run.")
    add = parser.add_argument
    add("--run", type=Path, required=True, help="the run directory")
    add("--checkpoints", default=ALL, help="all (with the start policy, step 0), latest, or steps such as 20,40")
    quick, full = PROFILES["quick"], PROFILES["full"]
    profiles = (
        f"quick: {quick.num_samples} samples of {quick.num_problems} held-out problems; full: {full.num_samples} "
        "samples of all held-out problems; both also draw a greedy completion of each problem (default: quick)"
    )
    add("--profile", choices=list(PROFILES), default="quick", help=profiles)
    add("--subset-frac", type=float, help="fraction of the held-out problems, instead of the profile's number")
    add("--num-samples", type=int, help="samples per problem, instead of the profile's number")
    add("--batch-size", type=int, default=256, help="completions at a time, halved if memory runs out (default: 256)")
    add("--timeout", type=float, help="seconds that a checkpoint may take, instead of the profile's number")
    add("--seed", type=int, help="seed of the choice of problems and of the samples (default: 0)")
    add("--device", default="auto", help="auto, cpu or cuda (default: auto)")
    samplers = "what generates the completions; auto takes vllm if it is installed and there is a GPU (default: auto)"
    add("--sampler", choices=["auto", TRANSFORMERS, VLLM], default="auto", help=samplers)
    return parser


def _is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def sampler_for(wanted: str, device: str) -> str:
    """The sampler to use: `wanted`, or for `auto` the fastest one that is available on `device`."""
    if wanted != "auto":
        return wanted
    if device == "cpu" or not _is_installed(VLLM):
        return TRANSFORMERS
    import torch

    return VLLM if torch.cuda.is_available() else TRANSFORMERS


@ending_in_one_line()
def main(argv: list[str] | None = None) -> None:
    """Evaluate the checkpoints that are not evaluated yet; exit with status 1 if one failed."""
    args = parse(argv)
    config, settings, targets = _plan(args)
    todo = [target for target in targets if not is_done(args.run, target, settings)]
    check_writable(args.run)
    _say_plan(args.run, settings, targets, todo)
    progress = Progress(len(todo))
    failed = [target.step for target in todo if not _evaluate(args, target, settings, progress, _device(args, config))]
    print(f"numbers {args.run / 'evaluation' / 'checkpoints.csv'}")
    if failed:
        steps = ", ".join(map(str, failed))
        sys.exit(f"{len(failed)} of {len(todo)} failed (steps {steps}); call again to retry them")


def _plan(args: argparse.Namespace) -> tuple[Json, Settings, list[Target]]:
    """The run's config, the settings of the evaluation, and the checkpoints; exits with a message if that fails."""
    chosen = {name: getattr(args, name) for name in ("subset_frac", "num_samples", "seed")}
    try:
        config = read_config(args.run)
        chosen["sampler"] = sampler_for(args.sampler, _device(args, config))
        settings = settings_of(config, PROFILES[args.profile], **chosen)
        return config, settings, targets_of(args.run, config, args.checkpoints)
    except ValueError as error:
        sys.exit(f"Error: {error}")


def _device(args: argparse.Namespace, config: Json) -> str:
    return "cpu" if config.get("use_cpu") and args.device == "auto" else args.device


def _evaluate(args: argparse.Namespace, target: Target, settings: Settings, progress: Progress, device: str) -> bool:
    """Evaluate one checkpoint and print its results; False if it failed."""
    run, timeout = RunDirectory(args.run), args.timeout or PROFILES[args.profile].timeout
    job = Job(target, settings, str(run.checkpoint_folder(target.step)), args.batch_size, device)
    problem = run_job(job, timeout, functools.partial(progress.show, target.step))
    progress.end_job()
    run.write_checkpoint_tables()
    if problem is None:
        result = f"{describe(run.checkpoint_summary(target.step))}{progress.left_after()}"
    else:
        result = f"failed: {problem}"
    print(f"step {target.step:>5}  {result}", flush=True)
    return problem is None


class Progress:
    """
    A line in the terminal with the progress of the current checkpoint and the time that all of them still need.

    Nothing is printed if the output is not a terminal.

    Args:
        num_jobs: number of checkpoints to evaluate.
    """

    def __init__(self, num_jobs: int) -> None:
        self.num_jobs, self.num_done, self.start = num_jobs, 0, time.monotonic()

    def show(self, step: int, done: int, total: int) -> None:
        """Show that `done` of `total` completions of the checkpoint of `step` are done."""
        if sys.stdout.isatty():
            print(f"\r\x1b[Kstep {step:>5}  {done}/{total} completions, {self.left(done / total)}", end="", flush=True)

    def left(self, share: float) -> str:
        """The time that is left at the speed so far, when `share` of the current checkpoint is done."""
        finished = self.num_done + share
        seconds = (time.monotonic() - self.start) / finished * (self.num_jobs - finished)
        return f"about {seconds:.0f} s left" if seconds < 90 else f"about {seconds / 60:.0f} min left"

    def left_after(self) -> str:
        """The time that is left, between two checkpoints; empty after the last."""
        return "" if self.num_done == self.num_jobs else f"; {self.left(0.0)}"

    def end_job(self) -> None:
        """Count a checkpoint that is done or has failed, and clear the line."""
        self.num_done += 1
        if sys.stdout.isatty():
            print("\r\x1b[K", end="")


def _say_plan(run: Path, settings: Settings, targets: list[Target], todo: list[Target]) -> None:
    num = "all" if settings.num_problems is None else settings.num_problems
    problems = num if settings.subset_frac is None else f"{settings.subset_frac:.3g} of the"
    done = f", {len(targets) - len(todo)} already done" if len(todo) < len(targets) else ""
    print(
        f"{run}: {len(todo)} checkpoints to evaluate{done}; {problems} held-out problems, with {settings.num_samples} "
        "samples and one greedy completion of each; 95 % intervals over problems",
        flush=True,
    )


if __name__ == "__main__":
    main()
