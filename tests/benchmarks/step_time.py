"""
Time of a training step relative to another way of training, measured in turns in one process.

    python tests/benchmarks/step_time.py trl      # DrGRPOTrainer with toggles off, relative to TRL's GRPOTrainer
    python tests/benchmarks/step_time.py probe    # with the entropy probe in every step, relative to without
    python tests/benchmarks/step_time.py probe --source held_out --prediction linear
    python tests/benchmarks/step_time.py noise_scale --hidden 128 512    # with that probe, relative to without

U are the step's own completions, E the completions of the entropy probe: by default a quarter as many.

For `trl` and `probe`, both sides train with the quickstart's settings and learning rate 0, and get the same random
state in every step, so that they draw the same completions. They take turns every few steps, so that changes of the
machine's speed affect both. Each round gives the ratio of the two median steps.

For `noise_scale` (LoRA of rank 16 on a Qwen2 with 8 layers, 8 prompts with 4 completions each, float32) both sides are
steps of one run: off, on, on, off. Each such round gives the ratio of the two sums.

Intervals are 95 % (Student's t) over rounds. Times are wall-clock seconds and CPU seconds of the process, which depend
less on other load.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from measuring import interval
from sequence_gradients import build as build_model
from transformers import AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from trl_entropy import DrGRPOConfig, DrGRPOTrainer
from trl_entropy.models.warm_start import warm_start
from trl_entropy.runs.console import quiet_libraries
from trl_entropy.tasks import rewards
from trl_entropy.tasks.word_problems import load_word_problems

QUICKSTART = {
    "num_generations": 8,
    "per_device_train_batch_size": 128,
    "max_completion_length": 32,
    "learning_rate": 0.0,
    "lr_scheduler_type": "constant",
    "adam_beta2": 0.99,
    "bf16": False,
    "gradient_checkpointing": False,
    "use_cpu": True,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "temperature": 1.0,
    "loss_type": "dr_grpo",
    "scale_rewards": "none",
    "beta": 0.0,
    "top_k": 0,
}


class Stopwatch(TrainerCallback):
    """
    Seconds of every step except the first of a turn, from its beginning until its metrics are logged.

    `logged` has, for the same steps, the times that training itself has logged.
    """

    def __init__(self) -> None:
        self.start_turn()

    def start_turn(self) -> None:
        self.seconds: list[float] = []
        self.cpu_seconds: list[float] = []
        self.logged: list[dict[str, float]] = []

    def median(self, name: str) -> float:
        """Median of steps: of `"wall"` or `"cpu"` seconds, or of wall seconds without the logged time of this name."""
        if name == "cpu":
            return statistics.median(self.cpu_seconds)
        rows = zip(self.seconds, self.logged, strict=True)
        return statistics.median(seconds - logs.get(name, 0.0) for seconds, logs in rows)

    def on_step_begin(self, args, state, control, **kwargs):
        torch.manual_seed(1000 * args.seed + state.global_step)
        self.start, self.cpu_start = time.perf_counter(), time.process_time()

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs and state.global_step > 1:
            self.seconds.append(time.perf_counter() - self.start)
            self.cpu_seconds.append(time.process_time() - self.cpu_start)
            self.logged.append({name: value for name, value in logs.items() if name.startswith("time/")})


def build(
    trainer_class: type,
    config_class: type,
    directory: Path,
    steps: int,
    model: Any = None,
    reward: Any = rewards.tag_pref,
    **settings,
):
    path = str(warm_start(seed=0))
    watch = Stopwatch()
    trainer = trainer_class(
        model=path if model is None else model,
        reward_funcs=reward,
        args=config_class(output_dir=str(directory), max_steps=steps + 1, **(QUICKSTART | settings)),
        train_dataset=load_word_problems("train", 4096, seed=0),
        processing_class=AutoTokenizer.from_pretrained(path, padding_side="left"),
    )
    for callback in [c for c in trainer.callback_handler.callbacks if type(c).__name__ == "PrinterCallback"]:
        trainer.remove_callback(callback)
    trainer.add_callback(watch)
    return trainer, watch


def paired(first, second, rounds: int, subtract: tuple[str, ...] = ()) -> dict[str, list[tuple[float, float]]]:
    """
    Median seconds per step of both sides in each round; the sides take turns, each starting every other round.

    Returns:
        `"wall"` and `"cpu"`: of whole steps; for each name in `subtract`: without the first side's logged time of it,
        and `"NAME, same steps"`: the first side with it and without.
    """
    results: dict[str, list[tuple[float, float]]] = {
        name: [] for name in ("wall", "cpu", *subtract, *map(_own, subtract))
    }
    for number in range(rounds):
        order = [first, second] if number % 2 == 0 else [second, first]
        for trainer, watch in order:
            watch.start_turn()
            trainer.args.seed = number
            folder = Path(trainer.args.output_dir)
            trainer.args.output_dir = str(folder.with_name(f"{folder.name.split('-')[0]}-{number}"))  # each is a run
            trainer.train()
        for name in ("wall", "cpu", *subtract):
            results[name].append((first[1].median(name), second[1].median("cpu" if name == "cpu" else "wall")))
        for name in subtract:
            results[_own(name)].append((first[1].median("wall"), first[1].median(name)))
    return results


def _own(name: str) -> str:
    return f"{name}, same steps"


def report(name: str, results: list[tuple[float, float]], num_completions: str) -> None:
    ratios = [a / b for a, b in results[1:]]  # without the first round, which warms up
    mean, low, high = interval(ratios)
    seconds = [statistics.median(side) for side in zip(*results[1:], strict=True)]
    print(
        f"{name}: ratio {mean:.4f}, 95 % interval {low:.4f} to {high:.4f}, {len(ratios)} rounds; "
        f"median step {seconds[0] * 1e3:.0f} ms against {seconds[1] * 1e3:.0f} ms; {num_completions}; "
        f"{torch.get_num_threads()} thread(s)"
    )


def odd_tokens(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
    """A reward that differs between the completions of a model with random weights."""
    return [sum(token % 2 for token in ids) / len(ids) for ids in completion_ids]


def noise_scale(hidden: int, options: argparse.Namespace) -> None:
    """Compare steps of a model with random weights, whose completions nearly all have the full 32 tokens."""
    with tempfile.TemporaryDirectory() as folder:
        trainer, watch = build(
            DrGRPOTrainer, DrGRPOConfig, Path(folder), 4 * options.rounds, build_model(hidden), odd_tokens,
            noise_scale_probe=True, per_device_train_batch_size=32, num_generations=4,
        )  # fmt: skip
        (probe,) = trainer.probe_runner.named_probes().values()
        probe.wants = lambda step: step % 4 in (3, 0)  # from the second step on: off, on, on, off
        trainer.train()
    for clock, name in ((watch.cpu_seconds, "CPU"), (watch.seconds, "wall")):
        blocks = [clock[start : start + 4] for start in range(0, len(clock), 4)]
        results = [((on + on_again) / 2, (off + off_again) / 2) for off, on, on_again, off_again in blocks]
        report(f"hidden {hidden}, noise scale probe on / off, {name}", results, "|U| = 32, 8 prompts")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["trl", "probe", "noise_scale"])
    parser.add_argument("--rounds", type=int, default=16, help="number of rounds; the first is not counted")
    parser.add_argument("--steps", type=int, default=5, help="steps per turn, after a first one that is not counted")
    parser.add_argument("--prompts", type=int, default=32, help="for `probe`: completions of the entropy probe, |E|")
    parser.add_argument("--source", default="next_rollouts", help="for `probe`: entropy_probe_completions")
    parser.add_argument("--prediction", default="trapezoid", help="for `probe`: entropy_prediction")
    parser.add_argument("--hidden", type=int, nargs="+", default=[128, 512], help="for `noise_scale`: hidden sizes")
    options = parser.parse_args()
    quiet_libraries()
    if options.what == "noise_scale":
        for hidden in options.hidden:
            noise_scale(hidden, options)
        return
    with tempfile.TemporaryDirectory() as folder:
        off = (DrGRPOTrainer, DrGRPOConfig, Path(folder) / "off", options.steps)
        if options.what == "trl":
            other = build(GRPOTrainer, GRPOConfig, Path(folder) / "trl", options.steps)
            results = paired(build(*off), other, options.rounds)
            for clock in ("wall", "cpu"):
                report(f"DrGRPOTrainer / GRPOTrainer, {clock}", results[clock], "|U| = 128")
            return
        settings = {
            "entropy_probe": True,
            "entropy_probe_completions": options.source,
            "entropy_probe_num_completions": options.prompts,
            "entropy_prediction": options.prediction,
            "probe_batch_size": 128,
        }
        on = build(DrGRPOTrainer, DrGRPOConfig, Path(folder) / "on", options.steps, **settings)
        draw, sizes = "time/entropy_draw", f"|U| = 128, |E| = {options.prompts}"
        results = paired(on, build(*off), options.rounds, (draw, "time/entropy"))
        named = f"entropy probe ({options.source}, {options.prediction}) on / off"
        for clock in ("wall", "cpu"):
            report(f"{named}, {clock}", results[clock], sizes)
        if options.source == "held_out":
            report("the same without drawing E", results[draw], sizes)
        report("the same without all of the probe's events (about 1)", results["time/entropy"], sizes)
        report("steps with the probe's events / the same steps without", results["time/entropy, same steps"], sizes)


if __name__ == "__main__":
    main()
