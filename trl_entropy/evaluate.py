"""
Evaluate a run's checkpoints: `trl-entropy evaluate --run RUN`.

Each checkpoint is evaluated in a process of its own, so its memory is given back and its failure stops no other. What
is done (same weights, same settings) is not done again.
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


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="trl-entropy evaluate", description="Evaluate the checkpoints of a run.")
    parser.add_argument("--run", type=Path, required=True, help="run directory")
    parser.add_argument(
        "--checkpoints", default=ALL, help="all (from the start policy, step 0), latest, or steps such as 20,40"
    )
    quick, full = PROFILES["quick"], PROFILES["full"]
    parser.add_argument(
        "--profile",
        choices=list(PROFILES),
        default="quick",
        help=f"quick: {quick.num_problems} held-out problems x {quick.num_samples} samples; full: all x "
        f"{full.num_samples}; both and a greedy completion of each",
    )
    parser.add_argument("--subset-frac", type=float, help="share of the held-out problems, in place of the profile's")
    parser.add_argument("--num-samples", type=int, help="samples a problem, in place of the profile's")
    parser.add_argument("--batch-size", type=int, default=256, help="completions at a time; halved on out-of-memory")
    parser.add_argument("--timeout", type=float, help="seconds for a checkpoint, in place of the profile's")
    parser.add_argument("--seed", type=int, help="of the choice of problems and of the samples (default 0)")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument(
        "--sampler",
        choices=["auto", TRANSFORMERS, VLLM],
        default="auto",
        help="what draws the completions; auto: vllm when it is installed and there is a GPU",
    )
    args = parser.parse_args(argv)
    if args.subset_frac is not None and not 0 < args.subset_frac <= 1:
        parser.error(f"--subset-frac is {args.subset_frac}; it is a share, above 0 and at most 1")
    for name in ("num_samples", "batch_size", "timeout"):
        if getattr(args, name) is not None and getattr(args, name) <= 0:
            parser.error(f"--{name.replace('_', '-')} is {getattr(args, name)}; it must be positive")
    if args.sampler == VLLM and not _is_installed(VLLM):
        parser.error("--sampler is vllm, which is not installed: pip install 'trl_entropy[vllm]'")
    return args


def _is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def sampler_for(wanted: str, device: str) -> str:
    """`wanted`, or for `auto` the fastest that there is on the device."""
    if wanted != "auto":
        return wanted
    if device == "cpu" or not _is_installed(VLLM):
        return TRANSFORMERS
    import torch

    return VLLM if torch.cuda.is_available() else TRANSFORMERS


def main(argv: list[str] | None = None) -> None:
    """Evaluate what is not evaluated yet; exits with 1 if a checkpoint failed."""
    args = parse(argv)
    profile = PROFILES[args.profile]
    chosen = {name: getattr(args, name) for name in ("subset_frac", "num_samples", "seed")}
    try:
        config = read_config(args.run)
        device = "cpu" if config.get("use_cpu") and args.device == "auto" else args.device
        chosen["sampler"] = sampler_for(args.sampler, device)
        settings, targets = settings_of(config, profile, **chosen), targets_of(args.run, config, args.checkpoints)
    except ValueError as error:
        sys.exit(f"Error: {error}")
    todo = [target for target in targets if not is_done(args.run, target, settings)]
    _say_plan(args.run, settings, targets, todo)
    progress = Progress(len(todo))
    failed = []
    for target in todo:
        output = RunDirectory(args.run).checkpoint_folder(target.step)
        job = Job(target, settings, str(output), args.batch_size, device)
        problem = run_job(job, args.timeout or profile.timeout, functools.partial(progress.show, target.step))
        progress.end_job()
        RunDirectory(args.run).write_checkpoint_tables()
        if problem is None:
            summary = RunDirectory(args.run).checkpoint_summary(target.step)
            print(f"step {target.step:>5}  {describe(summary)}{progress.left_after()}", flush=True)
        else:
            failed.append(target.step)
            print(f"step {target.step:>5}  failed: {problem}", flush=True)
    print(f"numbers {args.run / 'evaluation' / 'checkpoints.csv'}")
    if failed:
        sys.exit(
            f"{len(failed)} of {len(todo)} failed (steps {', '.join(map(str, failed))}); call again to retry them"
        )


class Progress:
    """
    One line in the terminal that says how far all checkpoints are and what time is left; nothing when not a terminal.

    Args:
        num_jobs: checkpoints to do.
    """

    def __init__(self, num_jobs: int) -> None:
        self.num_jobs, self.num_done, self.start = num_jobs, 0, time.monotonic()

    def show(self, step: int, done: int, total: int) -> None:
        """`done` of `total` completions of the checkpoint of `step`."""
        if sys.stdout.isatty():
            print(f"\r\x1b[Kstep {step:>5}  {done}/{total} completions, {self.left(done / total)}", end="", flush=True)

    def left(self, share: float) -> str:
        """The time left, as the completions so far took; `share` of the current checkpoint is done."""
        finished = self.num_done + share
        seconds = (time.monotonic() - self.start) / finished * (self.num_jobs - finished)
        return f"about {seconds:.0f} s left" if seconds < 90 else f"about {seconds / 60:.0f} min left"

    def left_after(self) -> str:
        """The same between two checkpoints; empty after the last."""
        return "" if self.num_done == self.num_jobs else f"; {self.left(0.0)}"

    def end_job(self) -> None:
        """A checkpoint is done or has failed."""
        self.num_done += 1
        if sys.stdout.isatty():
            print("\r\x1b[K", end="")


def _say_plan(run: Path, settings: Settings, targets: list[Target], todo: list[Target]) -> None:
    num = "all" if settings.num_problems is None else settings.num_problems
    problems = num if settings.subset_frac is None else f"{settings.subset_frac:.3g} of the"
    done = f", {len(targets) - len(todo)} already done" if len(todo) < len(targets) else ""
    print(
        f"{run}: {len(todo)} checkpoints to evaluate{done}; {problems} held-out problems, {settings.num_samples} "
        "samples and one greedy completion of each; intervals: 95 %, over problems",
        flush=True,
    )


if __name__ == "__main__":
    main()
