"""
Evaluate the checkpoints of a run: `trl-entropy evaluate --run RUN`.

Each checkpoint is evaluated in a process of its own, which gives its memory back when it ends and whose failure does
not stop the others. A checkpoint that was evaluated before, with the same weights and settings, is skipped; one whose
evaluation was cut off is gone on with.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import re
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

from trl_entropy.config.settings_file import sentence
from trl_entropy.evaluation.kept import discard_stale
from trl_entropy.evaluation.plan import (
    ALL,
    BATCH_SIZE,
    NOT_EVALUATED,
    PROFILES,
    TRANSFORMERS,
    VLLM,
    Job,
    Settings,
    Target,
    caveat_of,
    check_functions,
    difference,
    read_config,
    samplers_used,
    settings_of,
    targets_of,
)
from trl_entropy.evaluation.problems import held_out_problems
from trl_entropy.evaluation.process import describe, run_job
from trl_entropy.runs.counted import counted
from trl_entropy.runs.directory import CheckpointSummary, RunDirectory
from trl_entropy.runs.file_errors import check_writable, ending_in_one_line
from trl_entropy.runs.strict_json import Json
from trl_entropy.tasks.script import hand_over, parts_of

if TYPE_CHECKING:
    from trl_entropy.trainer.dr_grpo import DrGRPOTrainer

# Evaluates a job within a number of seconds and shows its progress; returns why it failed, or None.
_Run = Callable[[Job, float, Callable[[int, int], object]], str | None]
_CUT_OFF = "The evaluation is cut off. What it has generated is kept: call again to go on."


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line; an invalid value ends the program with a message."""
    parser = _parser()
    args = parser.parse_args(argv)
    if args.subset_frac is not None and not 0 < args.subset_frac <= 1:
        parser.error(f"--subset-frac is {args.subset_frac}; it must be above 0 and at most 1")
    for name in ("num_samples", "batch_size", "timeout"):
        if getattr(args, name) is not None and getattr(args, name) <= 0:
            parser.error(f"--{name.replace('_', '-')} is {getattr(args, name)}; it must be positive")
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", args.device):
        parser.error(f"--device is {args.device}; use auto, cpu, cuda, or one GPU such as cuda:1")
    if args.device.startswith("cuda") and not _has_gpu():
        parser.error(f"--device is {args.device}, but torch finds no GPU; use auto or cpu")
    if args.sampler == VLLM and not _is_installed(VLLM):
        parser.error("--sampler is vllm, which is not installed: pip install 'trl_entropy[vllm]'")
    return args


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="trl-entropy evaluate", description="Evaluate the checkpoints of a run.", allow_abbrev=False
    )
    add = parser.add_argument
    add("--run", type=Path, required=True, help="the run directory")
    add("--checkpoints", default=ALL, help="all (with the start policy, step 0), latest, or steps such as 20,40")
    quick, full = PROFILES["quick"], PROFILES["full"]
    profiles = (
        f"quick: {quick.num_samples} samples of {quick.num_problems} held-out problems; full: {full.num_samples} "
        "samples of all held-out problems; both also draw a greedy completion of each problem (default: the run's "
        "evaluate_profile if it evaluated during training, else quick)"
    )
    add("--profile", choices=list(PROFILES), help=profiles)
    add("--subset-frac", type=float, help="fraction of the held-out problems, instead of the profile's number")
    add("--num-samples", type=int, help="samples per problem, instead of the profile's number")
    batches = (
        f"completions at a time, halved if memory runs out (default: {BATCH_SIZE}); an evaluation that was cut off "
        "goes on with batches that are at most as large as before"
    )
    add("--batch-size", type=int, default=BATCH_SIZE, help=batches)
    add("--timeout", type=float, help="seconds that a checkpoint may take, instead of the profile's number")
    add("--seed", type=int, help="seed of the choice of problems and of the samples (default: 0)")
    add("--device", default="auto", help="auto, cpu or cuda (default: auto)")
    samplers = (
        "what generates the completions; auto takes what the run's checkpoints were evaluated with before, else vllm "
        "if it is installed and there is a GPU (default: auto)"
    )
    factory = (
        "path/to/script.py:function, which returns the trainer of a run of a script of one's own; its datasets and "
        "functions are what is evaluated. The script is imported, so that what starts training must stand under "
        'if __name__ == "__main__"'
    )
    add("--trainer_factory", "--trainer-factory", help=factory)
    add("--pass_reward", "--pass-reward", help="the reward function that says what passes, instead of the run's")
    passes = "a completion passes when its pass_reward is this much or more, instead of the run's"
    add("--pass_threshold", "--pass-threshold", type=float, help=passes)
    imports = "import the files with functions of one's own that the run was trained with, which runs them"
    add("--import_functions", "--import-functions", action="store_true", help=imports)
    add("--sampler", choices=["auto", TRANSFORMERS, VLLM], default="auto", help=samplers)
    return parser


def _is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def sampler_for(wanted: str, device: str, used: Sequence[str] = ()) -> str:
    """
    The sampler to use: `wanted`, or for `auto` one that can be used on `device`.

    Args:
        used: those with which other checkpoints of the run were evaluated, the best first; else the fastest is taken.
    """
    if wanted != "auto":
        return wanted
    has_vllm = device != "cpu" and _is_installed(VLLM) and _has_gpu()
    usable = [VLLM, TRANSFORMERS] if has_vllm else [TRANSFORMERS]
    return next((sampler for sampler in used if sampler in usable), usable[0])


@ending_in_one_line()
def main(argv: list[str] | None = None) -> None:
    """Evaluate the checkpoints that are not evaluated yet; exit with status 1 if one failed."""
    args = parse(argv)
    previous = signal.signal(signal.SIGTERM, _exit_on_signal)
    try:
        _evaluate_all(args)
    except ValueError as error:
        sys.exit(f"Error: {sentence(error)}")
    except KeyboardInterrupt:
        print(_CUT_OFF, file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    finally:
        signal.signal(signal.SIGTERM, previous)


def _exit_on_signal(number: int, frame: FrameType | None) -> NoReturn:
    """Leave through all `finally` clauses, so that the process that evaluates is ended; a second signal is ignored."""
    signal.signal(number, signal.SIG_IGN)
    print(_CUT_OFF, file=sys.stderr)
    sys.exit(128 + number)


def evaluate(
    trainer_factory: Callable[[], DrGRPOTrainer], run: str | Path | None = None, **options: Any
) -> list[CheckpointSummary]:
    """
    Evaluate the checkpoints of a run of a script of one's own, whose data and functions no settings file names.

    As `trl-entropy evaluate`, on the trainer's `eval_dataset` with its reward and metric functions, and in this
    process. What is evaluated already is skipped. `trl-entropy evaluate --run RUN --trainer_factory script.py:make`
    does the same from the command line, each checkpoint in a process of its own.

    Args:
        trainer_factory: makes the trainer with which the run was trained; it is called once, and nothing is trained.
        run: the run directory; None: `output_dir` of the trainer.
        options: those of the command line, by name: `checkpoints`, `profile`, `num_samples`, `subset_frac`, `seed`,
            `batch_size`, `device`, `sampler`, `pass_reward`, `pass_threshold`.

    Returns:
        The summaries of all evaluated checkpoints, in order of step; each has `step`, and `metrics` with `value`, and
        `low` and `high`, the ends of the 95 % interval over prompts, or None.

    Raises:
        ValueError: for what cannot be evaluated: an option, a trainer with a `rollout_func`, without an
            `eval_dataset`, or of whose reward functions none says what passes.
    """
    name = hand_over(trainer_factory)
    run = Path(run or parts_of(name).output_dir)
    words = [f"--{option.replace('_', '-')}={value}" for option, value in options.items() if value is not None]
    try:
        args = parse(["--run", str(run), f"--trainer-factory={name}", *words])
    except SystemExit as error:  # what is wrong has been printed
        raise ValueError(f"these are no options of an evaluation: {' '.join(words)}") from error
    _evaluate_all(args, in_this_process)
    return list(RunDirectory(run).checkpoint_summaries())


def in_this_process(job: Job, timeout: float, show: Callable[[int, int], object]) -> str | None:
    """As [`run_job`], without a process of its own and without a limit of its time."""
    if problem := job.target.problem():
        return problem
    from trl_entropy.evaluation.worker import evaluate as evaluate_job

    evaluate_job(job, show)
    return None


def _evaluate_all(args: argparse.Namespace, run: _Run | None = None) -> None:
    config = read_config(args.run, args.trainer_factory)
    config |= {name: given for name in ("pass_reward", "pass_threshold") if (given := getattr(args, name)) is not None}
    args.profile = args.profile or _profile_of(config)
    changed = check_functions(args.run, config, args.import_functions or args.trainer_factory is not None)
    settings, targets = _settings(args, config), targets_of(args.run, config, args.checkpoints)
    folder = args.run / "evaluation"
    check_writable(folder)
    problems = held_out_problems(settings, None)  # a fault in the data is found before anything is generated
    discard_stale(args.run)
    todo = {target: why for target in targets if (why := _why(args, target, settings))}
    _say_plan(args, settings, targets, todo, len(problems))
    for caveat in filter(None, (changed, caveat_of(config))):
        print(f"Warning: {caveat}.", flush=True)
    progress, device = Progress(len(todo)), _device(args, config)
    failed = [
        target.step for target in todo if not _evaluate(args, target, settings, progress, device, run or run_job)
    ]
    if not todo:  # an evaluation that was killed may have left them without its results
        RunDirectory(args.run).write_checkpoint_tables()
    print(f"numbers {folder / 'checkpoints.csv'}")
    if failed:
        steps = ", ".join(map(str, failed))
        sys.exit(f"{len(failed)} of {len(todo)} failed (steps {steps}); call again to retry them")


def _profile_of(config: Json) -> str:
    """That of the evaluations during training, if there were any, so that they are not done again."""
    profile = config.get("evaluate_profile") if config.get("evaluate_checkpoints", "none") != "none" else None
    return profile if profile in PROFILES else "quick"


def _settings(args: argparse.Namespace, config: Json) -> Settings:
    chosen = {name: getattr(args, name) for name in ("subset_frac", "num_samples", "seed")}
    settings = settings_of(config, PROFILES[args.profile], **chosen)
    if settings.max_tool_calling_iterations is not None:
        _check_episodes(args)
        return settings
    sampler = sampler_for(args.sampler, _device(args, config), samplers_used(args.run, settings))
    return replace(settings, sampler=sampler)


def _check_episodes(args: argparse.Namespace) -> None:
    """Raises `ValueError` for options that an evaluation of episodes does not have."""
    if args.sampler == VLLM:
        raise ValueError("--sampler is vllm, but the run has tools or environments; TRL's trainer draws its episodes")
    if ":" in args.device:
        raise ValueError(
            f"--device is {args.device}, but TRL's trainer, which draws the run's episodes, takes the first GPU: use "
            f"--device cuda, and CUDA_VISIBLE_DEVICES={args.device.partition(':')[2]}"
        )


def _why(args: argparse.Namespace, target: Target, settings: Settings) -> str | None:
    """Why a checkpoint is to be evaluated; None if it has been."""
    return difference(args.run, target, settings, any_sampler=args.sampler == "auto")


def _device(args: argparse.Namespace, config: Json) -> str:
    return "cpu" if config.get("use_cpu") and args.device == "auto" else args.device


def _evaluate(
    args: argparse.Namespace,
    target: Target,
    settings: Settings,
    progress: Progress,
    device: str,
    run_one: _Run,
) -> bool:
    """Evaluate one checkpoint and print its results; False if it failed."""
    run, timeout = RunDirectory(args.run), args.timeout or PROFILES[args.profile].timeout
    job = Job(target, settings, str(run.checkpoint_folder(target.step)), args.batch_size, device)
    problem = run_one(job, timeout, functools.partial(progress.show, target.step))
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


def _say_plan(
    args: argparse.Namespace, settings: Settings, targets: list[Target], todo: dict[Target, str], num_problems: int
) -> None:
    done = f", {len(targets) - len(todo)} already done" if len(todo) < len(targets) else ""
    print(
        f"{args.run}: {counted(len(todo), 'checkpoint')} to evaluate{done}; "
        f"{counted(num_problems, 'held-out problem')}, with "
        f"{counted(settings.num_samples, 'sample')} and one greedy completion of each, by {settings.sampler}; "
        "95 % intervals "
        "over problems",
        flush=True,
    )
    for why in dict.fromkeys(todo.values()):
        steps = ", ".join(str(target.step) for target in todo if todo[target] == why)
        if why != NOT_EVALUATED:
            print(f"done again, and the former results replaced: step {steps} ({why})", flush=True)


if __name__ == "__main__":
    main()
