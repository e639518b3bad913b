"""
The size of a run directory, and what it costs to open it, at any number of steps, completions and tokens.

    python tests/benchmarks/run_size.py --folder DIR [--steps 10000 --completions 1024 --tokens 1024]

Makes a synthetic run of every probe with the package's own writers: its default settings, random numbers, texts of
random words. The lines of metrics are made of all steps. Of the files that are there for some steps, those that a run
keeps at its end are made, or `--files` of each kind; the table says what is extrapolated.

Then it measures, each in a process of its own: `load_run` with its tables, `trl-entropy report`, and the page that
training itself writes at its end. Seconds are by the clock and of the CPU, which other load lengthens less; memory is
the peak of the resident set (Linux). Checkpoints are left out: their size is the model's.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

FULL = {"steps": 10_000, "completions": 1024, "tokens": 1024}
GENERATIONS, PROMPT_TOKENS, VOCABULARY, LETTERS_OF_A_TOKEN = 8, 160, 32_000, 4
EVERY_PROBE = {
    "entropy_probe": True, "entropy_attribution": "token", "noise_scale_probe": True,
    "fisher_probe": True, "effective_sample_size_probe": True, "optimizer_state_probe": True, "log_completions": True,
}  # fmt: skip
MEASURED = ("load_run", "report", "training")


# ---- a synthetic run


class SyntheticRun:
    """Writes the run into `folder`, as the settings that the package has by default would leave it."""

    def __init__(self, folder: Path, options: argparse.Namespace) -> None:
        from accelerate import Accelerator

        from trl_entropy import DrGRPOConfig
        from trl_entropy.models.embedded import build_tokenizer
        from trl_entropy.probes.files import ProbeFiles
        from trl_entropy.runs.directory import RunDirectory

        self.run, self.options = RunDirectory(folder), options
        self.args = DrGRPOConfig(
            output_dir=str(folder), max_steps=options.steps, per_device_train_batch_size=options.completions,
            num_generations=GENERATIONS, max_completion_length=options.tokens, use_cpu=True, bf16=False, **EVERY_PROBE,
        )  # fmt: skip
        self.random = np.random.default_rng(0)
        self.files = ProbeFiles(self.args, Accelerator(cpu=True), lambda: 1e-6, build_tokenizer())
        self.words = [
            "".join(self.random.choice(list("etaoinshrdlucmf"), size)) for size in range(2, 9) for _ in range(2000)
        ]

    def steps_with_files(self, keep: int | None) -> list[int]:
        """The steps whose files are made, of those that a finished run keeps."""
        kept = kept_at_the_end(self.options.steps, keep)
        return kept[-self.options.files :] if self.options.files else kept

    def write(self) -> None:
        self.run.write_config(self.args.to_dict())
        self.run.write_environment()
        self.write_metrics()
        self.write_tensorboard()
        self.write_probe_files()
        self.write_completions()
        self.write_evaluations()

    def row(self, step: int) -> dict[str, Any]:
        from trl_entropy.runs.metrics import METRICS

        values = dict(zip(METRICS, self.random.random(len(METRICS)).tolist(), strict=True))
        errors = {
            f"{key}_stderr": value / 9 for key, value in values.items() if METRICS[key].reduce in ("E", "U", "pairs")
        }
        return values | errors | {"epoch": step / 100, "time/entropy": 1.0, "entropy/num_prompts": 64}

    def write_metrics(self) -> None:
        for step in range(1, self.options.steps + 1):
            self.run.append_metrics(step, self.row(step))
            if step % 100 == 0:
                self.run.append_evaluation(step, {"reward": 0.5, "entropy": 0.3, "rewards/tag_pref/mean": 0.5})

    def write_tensorboard(self) -> None:
        from torch.utils.tensorboard import SummaryWriter

        with SummaryWriter(str(self.run.tensorboard_path)) as writer:
            for step in range(1, min(self.options.steps, TENSORBOARD_STEPS) + 1):
                for key, value in self.row(step).items():
                    writer.add_scalar(f"train/{key}", value, step)

    # ---- probe files

    def write_probe_files(self) -> None:
        for step in self.steps_with_files(self.args.probe_files_keep):
            self.write_probe_files_of(step)

    def write_probe_files_of(self, step: int) -> None:
        """As the probes write them: through the functions of theirs that write."""
        import torch

        from trl_entropy.estimators.noise.noise_scale import GroupProducts
        from trl_entropy.gradients.loss_coefficients import LossCoefficients
        from trl_entropy.gradients.scores import TokenScores
        from trl_entropy.probes.attribution import Contributions, StepAttribution
        from trl_entropy.probes.entropy import EntropyProbe
        from trl_entropy.probes.entropy_change import Ends
        from trl_entropy.probes.fisher import FisherProbe
        from trl_entropy.probes.noise_scale import NoiseScaleProbe
        from trl_entropy.rollouts.completions import Completions

        def numbers(*shape: int) -> torch.Tensor:
            return torch.from_numpy(self.random.standard_normal(shape, dtype=np.float32))

        def scores(batch: Any) -> TokenScores:
            return TokenScores(
                (numbers(*batch.completion_mask.shape).abs(),), (-numbers(*batch.completion_mask.shape).abs(),)
            )

        rollouts = self.rollouts(self.options.completions, step)
        record: Any = SimpleNamespace(step=step, rollouts=rollouts, learning_rate=1e-6)
        probe = EntropyProbe()
        probe._completions = Completions.of(self.rollouts(self.args.num_entropy_completions(), step))
        before, after = scores(probe._completions), scores(probe._completions)
        probe._write(self.args, self.files, record, Ends(before, after, after), True, "all prompts")
        attributed = Contributions(numbers(*rollouts.completion_mask.shape).double() * 1e-6, {}, scores(rollouts))
        coefficients = LossCoefficients(numbers(*rollouts.completion_mask.shape), None, None)
        StepAttribution("token", 64)._write(self.files, record, attributed, coefficients, None)
        groups = rollouts.prompt_index.unique()
        products = [GroupProducts(*(numbers(len(groups)).double() for _ in range(2))) for _ in range(2)]
        NoiseScaleProbe()._write(self.files, record, groups, products)
        fisher, number = FisherProbe(), self.args.fisher_num_sequences
        fisher._names = [
            f"base_model.model.model.layers.{i // 14}.self_attn.q_proj.lora_{'AB'[i % 2]}.default.weight"
            for i in range(392)
        ]
        fisher._kernel, fisher._norms = numbers(number, number).double(), numbers(392, number).double().abs()
        fisher._kernel = fisher._kernel @ fisher._kernel.T
        fisher._rows, fisher._prompts = torch.arange(number), rollouts.prompt_index[:number]
        fisher._rewards, fisher._advantages = rollouts.rewards[:number], rollouts.advantages[:number]
        fisher._lengths = rollouts.lengths[:number]
        fisher._parts = SimpleNamespace(_asdict=lambda: {name: numbers(number).double() for name in "abcde"})
        fisher._write(self.files, record, numbers(number).double(), numbers(number).double())

    def rollouts(self, number: int, step: int, generations: int = GENERATIONS) -> Any:
        """A step's completions; one in four reaches the largest length, the others are of any length."""
        import torch

        from trl_entropy.rollouts.batch import RolloutBatch

        tokens = self.options.tokens
        lengths = np.minimum(self.random.integers(1, tokens * 4 // 3, number), tokens)
        lengths[0] = tokens
        prompts = self.random.integers(PROMPT_TOKENS // 3, PROMPT_TOKENS, number)
        mask = torch.from_numpy((np.arange(tokens) < lengths[:, None]).astype(np.int64))
        prompt_mask = torch.from_numpy((np.arange(PROMPT_TOKENS) >= prompts[:, None]).astype(np.int64))
        ids = torch.from_numpy(self.random.integers(0, 100, (number, PROMPT_TOKENS + tokens)))
        rewards = torch.from_numpy(self.random.integers(0, 2, number).astype(np.float32))
        groups = torch.arange(number) // generations
        means = torch.zeros(int(groups.max()) + 1).index_add(0, groups, rewards) / generations
        advantages = rewards - means[groups]
        return RolloutBatch(
            prompt_ids=ids[:, :PROMPT_TOKENS], prompt_mask=prompt_mask, completion_ids=ids[:, PROMPT_TOKENS:] * mask,
            completion_mask=mask, loss_mask=mask, prompt_index=groups + step * number, rewards=rewards,
            raw_advantages=advantages, length_scale=torch.ones(number), advantages=advantages,
            first_position=torch.zeros(number, dtype=torch.long),
        )  # fmt: skip

    # ---- tables of completions

    def text(self, tokens: int) -> str:
        """Words as rare as in a language (Zipf's law); random ones, so that texts compress less than real ones do."""
        places = self.random.zipf(1.2, tokens * LETTERS_OF_A_TOKEN // 5) % len(self.words)
        return " ".join(self.words[place] for place in places)[: tokens * LETTERS_OF_A_TOKEN]

    def write_completions(self) -> None:
        """As TRL writes them in `log`, then as the trainer keeps them."""
        import pandas as pd

        from trl_entropy.runs.step_files import completions_path, keep_completions

        (self.run.path / "completions").mkdir()
        for step in self.steps_with_files(self.args.completions_files_keep):
            number = self.options.completions
            prompts = [self.text(PROMPT_TOKENS) for _ in range(number // GENERATIONS)]
            lengths = np.minimum(self.random.integers(1, self.options.tokens * 4 // 3, number), self.options.tokens)
            table = {
                "step": [step] * number, "prompt": [prompts[row // GENERATIONS] for row in range(number)],
                "completion": [self.text(int(length)) for length in lengths],
                "tag_pref": self.random.integers(0, 2, number).astype(float).tolist(),
                "advantage": self.random.random(number).tolist(),
            }  # fmt: skip
            pd.DataFrame(table).to_parquet(completions_path(self.run.path, step))
            keep_completions(self.run.path, step, self.args.completions_files_keep)

    # ---- evaluated checkpoints

    def write_evaluations(self) -> None:
        from trl_entropy.evaluation.worker import _write

        checkpoints = np.linspace(0, self.options.steps, self.options.checkpoints, dtype=int).tolist()
        for step in checkpoints:
            records = self.records()
            metrics = {
                name: {"value": 0.5, "low": 0.4, "high": 0.6}
                for name in ("pass@1", "pass@4", "greedy_accuracy", "entropy_mean", "surprisal_mean")
            }
            settings = {"num_samples": 4}
            summary: Any = {"step": step, "settings": settings, "num_prompts": 256, "metrics": metrics}
            _write(self.run.checkpoint_folder(step), records, records[["prompt_id", "correct"]], summary)
        self.run.write_checkpoint_tables()

    def records(self) -> Any:
        """256 problems with a greedy completion and four samples each."""
        import pandas as pd

        rows = []
        for place in range(256 * 5):
            length = int(self.random.integers(1, self.options.tokens))
            prompt = rows[-1]["prompt"] if place % 5 else self.text(PROMPT_TOKENS)
            rows.append({
                "prompt_id": f"problem-{place // 5}", "prompt": prompt,
                "answer": "7", "greedy": place % 5 == 0, "sample": max(place % 5 - 1, 0),
                "completion": self.text(length), "completion_ids": self.random.integers(0, 100, length).tolist(),
                "logps": (-self.random.random(length, np.float32)).tolist(),
                "entropies": self.random.random(length, np.float32).tolist(), "length": length,
                "clipped": False, "correct": bool(place % 2), "tag_pref": float(place % 2),
            })  # fmt: skip
        return pd.DataFrame(rows)


TENSORBOARD_STEPS = 100


def kept_at_the_end(num_steps: int, keep: int | None) -> list[int]:
    """The steps that have files at the end of a run in which each step has written one."""
    from trl_entropy.runs.retention import retained

    return retained(range(1, num_steps + 1), keep)


# ---- its size


def sizes(run: Path, options: argparse.Namespace) -> list[tuple[str, int, int, float]]:
    """By kind of file: how many, bytes, and bytes at the full size."""
    from trl_entropy import DrGRPOConfig

    defaults = DrGRPOConfig(output_dir="x", use_cpu=True, bf16=False)
    of_tokens = FULL["tokens"] / options.tokens
    of_rows = of_tokens * FULL["completions"] / options.completions
    scales = {"probes/entropy": of_tokens, "probes/fisher": 1.0, "probes/noise_scale": of_rows / of_tokens}
    rows = []
    for kind in (
        "metrics.jsonl",
        "tensorboard",
        "completions",
        *sorted(f"probes/{p.name}" for p in run.glob("probes/*/")),
        "evaluation",
    ):
        found = [path for path in (run / kind, *run.glob(f"{kind}/**/*")) if path.is_file()]
        size, scale = sum(path.stat().st_size for path in found), 1.0
        if kind == "metrics.jsonl":
            scale = FULL["steps"] / options.steps
        elif kind == "tensorboard":
            scale = FULL["steps"] / min(options.steps, TENSORBOARD_STEPS)
        elif kind == "completions":
            scale = of_rows * len(kept_at_the_end(FULL["steps"], defaults.completions_files_keep)) / len(found)
        elif kind.startswith("probes"):
            kept = kept_at_the_end(FULL["steps"], defaults.probe_files_keep)
            scale = scales.get(kind, of_rows) * len(kept) / len(found)
        rows.append((kind, len(found), size, size * scale))
    return rows


# ---- what it costs to open it


def measure(what: str, run: Path) -> None:
    """Prints seconds and MiB of one of [`MEASURED`]; called in a process of its own."""
    if what == "training":
        import trl_entropy.train  # noqa: F401  # what training has loaded before it writes its page
    before, begin, cpu = memory("VmRSS"), time.perf_counter(), time.process_time()
    if what == "load_run":
        open_tables(run)
    elif what == "report":
        from trl_entropy.report import main as report

        report([str(run)])
    else:
        from trl_entropy.reporting.write import write_report_of_finished_run

        write_report_of_finished_run(run)
    wall, cpu, peak = time.perf_counter() - begin, time.process_time() - cpu, memory("VmHWM")
    print(f"{what:<10}{wall:7.1f} s, CPU {cpu:.1f} s; peak {peak:.0f} MiB, {peak - before:.0f} above what was loaded")


def open_tables(run: Path) -> None:
    """What a notebook asks for first."""
    from trl_entropy.analysis.contents import PARTS, describe
    from trl_entropy.analysis.run import load_run

    opened = load_run(run)
    for part in PARTS:
        print(describe(opened, part))
    print(opened.steps.shape, len(opened.rows("reward")), opened.training_evaluation.shape, opened.evaluation.shape)
    print(opened.last_tokens().shape, opened.last_kernel().shape)


def memory(field: str) -> float:
    """`VmRSS` or `VmHWM` of this process in MiB; unlike `ru_maxrss`, not inherited from the one that started it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in FULL.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument(
        "--files", type=int, default=0, help="of each kind of file, how many at most; 0: as a run keeps"
    )
    parser.add_argument("--checkpoints", type=int, default=5, help="evaluated checkpoints")
    parser.add_argument("--folder", type=Path, help="where to make the run, and leave it (default: nowhere)")
    parser.add_argument("--measure", choices=MEASURED, help="of the run that is in --folder, in this process")
    options = parser.parse_args()
    if options.measure:
        measure(options.measure, options.folder)
        return
    with tempfile.TemporaryDirectory() as temporary:
        run = (options.folder or Path(temporary)) / "synthetic"
        if not run.exists():
            SyntheticRun(run, options).write()
        rows = sizes(run, options)
        full = " x ".join(f"{value:,}" for value in FULL.values())
        print(json.dumps({"made": {name: getattr(options, name) for name in FULL}}))
        print(f"{'':<20}{'files':>7}{'MB':>10}  MB at {full}")
        for kind, number, size, extrapolated in rows:
            print(f"{kind:<20}{number:>7}{size / 1e6:>10.1f}{extrapolated / 1e6:>12.0f}")
        print(f"{'all':<27}{sum(row[2] for row in rows) / 1e6:>10.1f}{sum(row[3] for row in rows) / 1e6:>12.0f}")
        for what in MEASURED:
            subprocess.run([sys.executable, __file__, "--measure", what, "--folder", str(run)], check=False)


if __name__ == "__main__":
    main()
