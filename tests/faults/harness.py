"""
Training, resumption and archiving with a fault at the n-th operation on files: killed before it or in its middle, a
disk that is full from then on, an error at it alone. Afterwards `latest_or_new` must go on and end as if nothing had
been, and nothing may be read as whole that is not.

    PYTHONPATH=.:tests python -m faults.harness --points 500 --seed 0

It starts itself anew with the library of `fail_at.c`, which gcc compiles, in LD_PRELOAD; each attempt is a fork.
"""

import argparse
import ctypes
import hashlib
import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

MODES = ("killed before", "killed in the middle of", "disk full from", "error at")
SECONDS = 120  # that an attempt may take
STEPS = 3


class Ended(NamedTuple):
    """How a forked attempt ended: `result` is what it returned; None if it was killed or raised."""

    result: object
    error: str
    operations: int


def library(folder: Path) -> Path:
    """The compiled library of `fail_at.c`."""
    target = folder / "fail_at.so"
    source = Path(__file__).with_name("fail_at.c")
    subprocess.run(["gcc", "-shared", "-fPIC", "-O1", "-Wall", "-o", target, source, "-ldl"], check=True)
    return target


def attempt(call: Callable[[], object], below: Path, at: int = -1, mode: int = 0) -> Ended:
    """Run `call` in a fork in which the operation number `at` on files below a folder fails; -1: none does."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        signal.alarm(SECONDS)
        faults = ctypes.CDLL(None)
        faults.fail_at.argtypes = [ctypes.c_char_p, ctypes.c_long, ctypes.c_int]
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        faults.fail_at(str(below).encode(), at, mode)
        result, error = None, ""
        try:
            result = call()
        except BaseException as raised:
            error = f"{type(raised).__name__}: {raised}"
        faults.fail_at(b"", -1, 0) if at >= 0 else None
        with os.fdopen(write, "wb") as pipe:
            pipe.write(pickle.dumps((result, error, faults.operations())))
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        data = pipe.read()
    _, status = os.waitpid(child, 0)
    if not data:
        return Ended(None, f"signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else "no result", 0)
    return Ended(*pickle.loads(data))


class Training:
    """Three steps of the tiny model with a checkpoint each, a probe's files and completions."""

    def __init__(self) -> None:
        from datasets import Dataset

        from trl_entropy.models.embedded import build_tokenizer

        self.tokenizer = build_tokenizer()
        self.data = Dataset.from_dict({"prompt": [f"{name} has {i} apples." for i, name in enumerate("ABCDEFGH")]})

    def run(self, path: Path, resume: str | None = "latest_or_new", **settings: object) -> object:
        """Train, or go on; the weights and the metrics at the end."""
        import torch

        from trl_entropy import DrGRPOConfig, DrGRPOTrainer
        from trl_entropy.models.embedded import build_model
        from trl_entropy.runs.directory import RunDirectory

        torch.set_num_threads(1)
        config = {
            **{"output_dir": str(path), "num_generations": 4, "per_device_train_batch_size": 16, "bf16": False},
            **{"max_completion_length": 4, "learning_rate": 1e-3, "max_steps": STEPS, "use_cpu": True, "seed": 1},
            **{"gradient_checkpointing": False, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 2},
            **{"disable_tqdm": True, "report_to": "none", "log_completions": True, "num_completions_to_print": 0},
            **{
                "entropy_probe": True,
                "entropy_probe_completions": "held_out",
                "entropy_probe_num_completions": 4,
                **settings,
            },
        }
        trainer = DrGRPOTrainer(
            model=build_model(self.tokenizer, seed=0),
            reward_funcs=lambda completion_ids, **_: [sum(t % 2 for t in ids) / len(ids) for ids in completion_ids],
            args=DrGRPOConfig(**config),
            train_dataset=self.data,
            processing_class=self.tokenizer,
        )
        trainer.train(resume_from_checkpoint=resume)
        digest = hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in trainer.model.parameters())).hexdigest()
        rows = [
            {name: value for name, value in row.items() if "time" not in name and "per_second" not in name}
            for row in RunDirectory(path).metrics()
        ]
        files = [file for part in ("probes", "completions") for file in (path / part).rglob("*")]
        return digest, json.dumps(rows, sort_keys=True), sorted(str(file.relative_to(path)) for file in files)


def state_is_read(path: Path) -> str:
    """What is wrong with the state that a fault has left, for its readers; empty: nothing."""
    from trl_entropy.runs import checkpoints
    from trl_entropy.runs.directory import RunDirectory

    try:
        steps = [row["step"] for row in RunDirectory(path).metrics()]
        if steps != sorted(set(steps)):
            return f"the steps {steps} are logged"
        for checkpoint in checkpoints.checkpoints_of(path):
            if (checkpoint / checkpoints.SEAL).exists():
                checkpoints.check_files(checkpoint)  # sealed, and so whole
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


class Outcome(NamedTuple):
    """A point: what failed, and what was wrong afterwards; empty: nothing."""

    point: str
    wrong: str


def training_point(training: Training, expected: object, at: list[int], mode: int, base: Path | None) -> str:
    """One or two faults in a row, then an attempt without; what is wrong, or nothing."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder).resolve() / "run"
        resume: str | None = None
        if base is not None:
            shutil.copytree(base, run)
            resume = str(run / "checkpoint-2")
        for number in at:
            ended = attempt(partial(training.run, run, resume), run, number, mode)
            if ended.result is not None and ended.result != expected:
                return f"it ended with other numbers in spite of the fault: {ended.error}"
            resume = "latest_or_new"
            if wrong := state_is_read(run):
                return f"after the fault ({ended.error}): {wrong}"
        last = attempt(lambda: training.run(run), run)
        if last.error:
            return f"it did not go on: {last.error}"
        return "" if last.result == expected else f"it went on to other numbers: {last.result} instead of {expected}"


def archive_point(run: Path, at: int, mode: int) -> str:
    """A fault while a run is archived: a manifest is there only with all its files, and a second call completes it."""
    from trl_entropy.archive import MANIFEST, archive

    with tempfile.TemporaryDirectory() as folder:
        there = Path(folder).resolve() / "archive"
        target = there / run.name
        attempt(lambda: len(archive(run, f"file://{there}").files), there, at, mode)
        for _ in range(2):
            if (target / MANIFEST).exists():
                listed = json.loads((target / MANIFEST).read_text())["files"]
                for name, described in listed.items():
                    data = (target / name).read_bytes() if (target / name).exists() else b""
                    if (len(data), hashlib.sha256(data).hexdigest()) != (described["size"], described["sha256"]):
                        return f"the manifest names {name}, which is not as it says"
            ended = attempt(lambda: len(archive(run, f"file://{there}").files), there)
            if ended.error:
                return f"it cannot be completed: {ended.error}"
        return "" if (target / MANIFEST).exists() else "there is no manifest at last"


def points(number: int, seed: int, kinds: tuple[str, ...] = ("training", "resumption", "archive")) -> list[Outcome]:
    """Try that many faults, spread over all operations of the kinds, and return what was wrong at each."""
    rng, outcomes = random.Random(seed), []
    training = Training()
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder).resolve() / "base"
        whole = attempt(lambda: training.run(base), base)
        assert not whole.error, whole.error
        again = Path(folder).resolve() / "again"
        shutil.copytree(base, again)
        resumed = attempt(lambda: training.run(again, str(again / "checkpoint-2")), again)
        assert not resumed.error and resumed.result == whole.result, resumed.error
        there = Path(folder).resolve() / "counted"
        from trl_entropy.archive import archive

        archived = attempt(lambda: len(archive(base, f"file://{there}").files), there)
        size = {"training": whole.operations, "resumption": resumed.operations, "archive": archived.operations}
        for place in range(number):
            kind, mode = kinds[place % len(kinds)], place // len(kinds) % len(MODES)
            at = rng.randrange(size[kind])
            if kind == "archive":
                wrong = archive_point(base, at, mode)
            else:
                ats = [at] if rng.random() < 0.7 else [at, rng.randrange(size[kind])]
                wrong = training_point(training, whole.result, ats, mode, base if kind == "resumption" else None)
            outcomes.append(Outcome(f"{kind}, {MODES[mode]} operation {at} of {size[kind]}", wrong))
            if wrong:
                print(f"{outcomes[-1].point}: {wrong}", flush=True)
    return outcomes


def plant() -> None:
    """Have the archive leave every file empty that it says to have copied."""
    from trl_entropy import archive

    copy = archive._copy

    def leave_empty(source: Path, fs: object, target: str) -> object:
        digest = copy(source, fs, target)
        Path(target).write_bytes(b"")
        return digest

    archive._copy = leave_empty


def main() -> None:
    """Exit with status 1 if a fault lost something."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--points", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--planted", action="store_true", help="archive without copying, which must be found")
    args = parser.parse_args()
    if "fail_at" not in os.environ.get("LD_PRELOAD", ""):
        environment = os.environ | {"LD_PRELOAD": str(library(Path(tempfile.mkdtemp()))), "OMP_NUM_THREADS": "1"}
        os.execve(sys.executable, [sys.executable, "-m", "faults.harness", *sys.argv[1:]], environment)
    shutil.rmtree(Path(os.environ["LD_PRELOAD"]).parent)  # it is loaded
    if args.planted:
        plant()
    outcomes = points(args.points, args.seed, *([("archive",)] if args.planted else []))
    lost = [outcome for outcome in outcomes if outcome.wrong]
    tried = Counter(outcome.point.split(",")[0] for outcome in outcomes)
    print(f"{len(outcomes)} faults {dict(tried)}, seed {args.seed}: {len(lost)} lost something")
    sys.exit(bool(lost))


if __name__ == "__main__":
    main()
