"""The commands that harness.py lets fail, tiny: each one's first call, its repetition, and what must hold between."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import os
import re
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import IO, Any

STEPS, NUM_COMPLETIONS = 3, 16  # completions of a step
_ENDS_WITH_PARENT = 1  # PR_SET_PDEATHSIG
_MINUTE = re.compile(rb"Written \d{4}-\d\d-\d\d \d\d:\d\d")


@dataclass(frozen=True)
class Command:
    """
    A command that writes into a folder, and can be repeated after a fault.

    Attributes:
        base: what the folder holds before it; None: nothing.
        first: the call in which a fault occurs; it returns what the folder holds at its end.
        again: the call that goes on.
        wrong: what is wrong with a folder that a fault has left, of which `again` would make what is expected, the
            second argument; empty: nothing.
    """

    name: str
    base: Path | None
    first: Callable[[Path], Any]
    again: Callable[[Path], Any]
    wrong: Callable[[Path, Any], str]


def import_everything() -> None:
    """What a command imports, so that a fork need not: it takes longer than the command."""
    import matplotlib.pyplot  # noqa: F401
    import pandas  # noqa: F401
    import pyarrow.parquet  # noqa: F401
    import trl  # noqa: F401

    import trl_entropy.analysis.plots
    import trl_entropy.archive
    import trl_entropy.evaluate
    import trl_entropy.evaluation.worker
    import trl_entropy.report
    import trl_entropy.reporting.page
    import trl_entropy.trainer.dr_grpo  # noqa: F401


def digests(folder: Path) -> dict[str, str]:
    """A hash of each file below a folder, by its name there; the minute in which a page was written apart."""
    return {
        str(file.relative_to(folder)): hashlib.sha256(_MINUTE.sub(b"", file.read_bytes())).hexdigest()[:16]
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def hidden(folder: Path) -> list[str]:
    """The names of unfinished files: what is written is renamed to a name that is not hidden."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob(".*"))


# ---- training


class Training:
    """Three steps of the tiny model with a checkpoint, an evaluation, a probe's files and completions at each."""

    def __init__(self) -> None:
        from datasets import Dataset

        from trl_entropy.models.embedded import build_tokenizer

        self.tokenizer = build_tokenizer()
        self.data = Dataset.from_dict({"prompt": [f"{name} has {i} apples." for i, name in enumerate("ABCDEFGH")]})

    def run(self, path: Path, resume: str | None = "latest_or_new", **settings: object) -> object:
        """Train, or go on; the weights, the metrics and the names of the files at the end."""
        import torch

        from trl_entropy import DrGRPOConfig, DrGRPOTrainer
        from trl_entropy.models.embedded import build_model
        from trl_entropy.runs.directory import RunDirectory

        torch.set_num_threads(1)
        config = {
            **{
                "output_dir": str(path),
                "num_generations": 4,
                "per_device_train_batch_size": NUM_COMPLETIONS,
                "bf16": False,
            },
            **{"max_completion_length": 4, "learning_rate": 1e-3, "max_steps": STEPS, "use_cpu": True, "seed": 1},
            **{"gradient_checkpointing": False, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 2},
            **{"disable_tqdm": True, "report_to": "none", "log_completions": True, "num_completions_to_print": 0},
            **{"entropy_probe": True, "eval_strategy": "steps", "eval_steps": 1},
            **{"per_device_eval_batch_size": 2, "num_generations_eval": 1, **settings},
        }
        trainer = DrGRPOTrainer(
            model=build_model(self.tokenizer, seed=0),
            reward_funcs=lambda completion_ids, **_: [sum(t % 2 for t in ids) / len(ids) for ids in completion_ids],
            args=DrGRPOConfig(**config),
            train_dataset=self.data,
            eval_dataset=self.data.select(range(2)),
            processing_class=self.tokenizer,
        )
        trainer.train(resume_from_checkpoint=resume)
        digest = hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in trainer.model.parameters())).hexdigest()
        run = RunDirectory(path)
        tables = [[_without_clocks(row) for row in rows] for rows in (run.metrics(), run.evaluation())]
        files = [file for part in ("probes", "completions") for file in (path / part).rglob("*")]
        return digest, json.dumps(tables, sort_keys=True), sorted(str(file.relative_to(path)) for file in files)


def _without_clocks(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if not re.search("time|per_second", name)}


def training_is_wrong(path: Path, expected: object) -> str:
    """What is wrong with a run for those who read it."""
    import safetensors

    from trl_entropy.analysis.run import load_run
    from trl_entropy.runs import checkpoints
    from trl_entropy.runs.directory import RunDirectory

    try:
        for rows in (RunDirectory(path).metrics(), RunDirectory(path).evaluation()):
            steps = [row["step"] for row in rows]
            if steps != sorted(set(steps)):
                return f"the steps {steps} are logged"
        for checkpoint in checkpoints.checkpoints_of(path):
            if (checkpoint / checkpoints.SEAL).exists():
                checkpoints.check_files(checkpoint)  # sealed, and so whole
        for file in path.glob("probes/*/step_*.safetensors"):
            with safetensors.safe_open(file, "numpy") as opened:
                _ = [opened.get_tensor(name) for name in opened.keys()]  # noqa: SIM118
        if (path / "completions").exists():  # a file that is cut is left out
            completions = load_run(path).completions
            sizes = completions.groupby("step").size().unique().tolist() if len(completions) else []
            if sizes not in ([], [NUM_COMPLETIONS]):
                return f"completions of a step: {sizes}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def training_commands(training: Training, base: Path) -> list[Command]:
    """Training from the beginning, and from the checkpoint of step 2 of a finished run."""
    begins = Command("training", None, partial(training.run, resume=None), training.run, training_is_wrong)

    def from_step_2(path: Path) -> object:
        return training.run(path, str(path / "checkpoint-2"))

    return [begins, replace(begins, name="resumption", base=base, first=from_step_2)]


# ---- evaluation


def make_evaluable(path: Path) -> None:
    """Let a run's settings name a task, as those of the command do."""
    import yaml

    from trl_entropy.runs.directory import RunDirectory

    config = yaml.safe_load((path / "config.yaml").read_text())
    RunDirectory(path).write_config(config | {"task": "word_problems", "reward_funcs": ["tag_pref"]})


def evaluated(path: Path, num_samples: int = 1) -> object:
    """Evaluate the two checkpoints of a run on two problems; what `evaluation/` holds then, and what is unfinished."""
    from trl_entropy import evaluate
    from trl_entropy.evaluation import process

    process._run = _run_in_a_fork
    given = ["--run", str(path), "--checkpoints", "2,3", "--subset-frac", "0.001", "--batch-size", "1"]
    evaluate.main([*given, "--num-samples", str(num_samples), "--device", "cpu"])
    return evaluation_of(path), hidden(path)


def _run_in_a_fork(job: Any, temporary: str, messages: IO[str], show: object, stop: object) -> tuple[int, str]:
    """The worker of an evaluation without a new interpreter; like the real one, it ends when its parent does."""
    from trl_entropy.evaluation import worker

    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            ctypes.CDLL(None).prctl(_ENDS_WITH_PARENT, signal.SIGKILL)
            os.dup2(write, 1)
            os.dup2(messages.fileno(), 2)
            sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
            worker.run(job.to_json())
            status = 0
        finally:
            with contextlib.suppress(OSError):
                sys.stderr.flush()
            os._exit(status)
    os.close(write)
    with os.fdopen(read) as pipe:
        lines = pipe.read().splitlines()
    _, status = os.waitpid(child, 0)
    said = next((line.removeprefix(worker.FAILED).strip() for line in lines if line.startswith(worker.FAILED)), "")
    return os.waitstatus_to_exitcode(status), said


def evaluation_of(path: Path) -> dict[str, Any]:
    """Each checkpoint's results, without the seconds that they took, and the tables."""
    found: dict[str, Any] = {}
    for folder in sorted(path.glob("evaluation/step_*")):
        files: dict[str, object] = dict(digests(folder)) if folder.is_dir() else {}
        if "summary.json" in files:
            summary = json.loads((folder / "summary.json").read_text())
            files["summary.json"] = json.dumps(summary | {"seconds": 0})
        if files:
            found[folder.name] = files
    return found | {file.name: _rows_of(file) for file in sorted(path.glob("evaluation/*.csv"))}


def _rows_of(table: Path) -> list[dict[str, float | str]]:
    from trl_entropy.runs.reading import UnreadableFile, read_csv_lines

    rows, cut = read_csv_lines(table)
    if cut:
        raise UnreadableFile(f"{table.name} is cut in its lines {cut}")
    return [_without_clocks(row) for row in rows]


def evaluation_command(base: Path) -> Command:
    """The evaluation of two checkpoints, one of which has results of other settings, which are replaced."""
    before = evaluation_of(base)

    def wrong(path: Path, expected: Any) -> str:
        try:
            for name, found in evaluation_of(path).items():
                old, new = before.get(name), expected[0].get(name)
                if name.endswith(".csv"):  # of the results at some moment: each row is one of the two
                    torn = [row for row in found if row not in [*(old or []), *(new or [])]]
                elif found not in (old, new):
                    torn = [found]
                else:
                    torn = []
                if torn:
                    return f"{name} is neither what it was nor what it shall be: {torn}"
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return ""

    return Command("evaluation", base, evaluated, evaluated, wrong)


# ---- report


def reported(path: Path) -> object:
    """Write the page of a run; what `report/` holds then, and what is unfinished."""
    from trl_entropy import report

    report.main([str(path)])
    return digests(path / "report"), hidden(path)


def report_command(base: Path) -> Command:
    """The page of a run that has one already, of fewer steps."""
    before = digests(base / "report")

    def wrong(path: Path, expected: Any) -> str:
        found = {name: digest for name, digest in digests(path / "report").items() if not name.startswith(".")}
        torn = [name for name, digest in found.items() if digest not in (before.get(name), expected[0].get(name))]
        return f"{', '.join(torn)}: neither what it was nor what it shall be" if torn else ""

    return Command("report", base, reported, reported, wrong)


# ---- archive


def archive_command(run: Path) -> Command:
    """A copy of a finished run."""
    from trl_entropy.archive import MANIFEST, archive

    def archived(there: Path) -> object:
        archive(run, f"file://{there}")
        return digests(there)

    def wrong(there: Path, expected: object) -> str:
        target = there / run.name
        if not (target / MANIFEST).exists():
            return ""
        for name, described in json.loads((target / MANIFEST).read_text())["files"].items():
            data = (target / name).read_bytes() if (target / name).exists() else b""
            if (len(data), hashlib.sha256(data).hexdigest()) != (described["size"], described["sha256"]):
                return f"the manifest names {name}, which is not as it says"
        return ""

    return Command("archive", None, archived, archived, wrong)
