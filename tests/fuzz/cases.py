"""
Mutated configs, data files and run directories: every command ends with an exit status and one line.

    PYTHONPATH=.:tests python -m fuzz.cases config --cases 1000 --seed 0 --found tests/fuzz/corpus
    PYTHONPATH=.:tests python -m fuzz.cases data --cases 400
    PYTHONPATH=.:tests python -m fuzz.cases run --cases 600

What ends otherwise is printed, and with `--found` kept in a file that `test_fuzz.py` tries ever after.
"""

import argparse
import contextlib
import dataclasses
import io
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

from fuzz.mutations import BYTES, mutated_json_lines, mutated_yaml
from real_run import train_and_evaluate

REPOSITORY = Path(__file__).parents[2]
CONFIGS = sorted((REPOSITORY / "configs").glob("*.yaml"))
SECONDS = 120  # a case that takes longer hangs


def record(i: int) -> dict[str, str]:
    total = 2 * i + 1
    answer = f"{i}+{i + 1}=<<{i}+{i + 1}={total}>>{total}.\n#### {total}"
    return {"question": f"Ann has {i} apples and buys {i + 1} more. How many?", "answer": answer}


class Hang(BaseException):
    """A case took too long."""


def fault_of(call: Callable[[], object]) -> str | None:
    """
    How a command ended that should end with an exit status and one line; None if it did.

    `call` may raise `SystemExit` with a status or with one line; it may not raise anything else.
    """

    def hang(*_: object) -> None:
        raise Hang

    signal.signal(signal.SIGALRM, hang)
    signal.alarm(SECONDS)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            call()
    except SystemExit as end:
        if isinstance(end.code, str) and len(end.code.strip().splitlines()) != 1:
            return f"not one line: {end.code[:300]!r}"
    except Hang:
        return f"no end within {SECONDS} s"
    except Exception:
        return "".join(traceback.format_exc(limit=-4))
    finally:
        signal.alarm(0)
    return None


@contextlib.contextmanager
def empty_folder() -> Iterator[Path]:
    """A working directory of its own."""
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            yield Path(folder)
        finally:
            os.chdir(before)


# ---- configs


def setting_names() -> tuple[str, ...]:
    from trl import ModelConfig

    from trl_entropy import DrGRPOConfig
    from trl_entropy.tasks.arguments import TaskArguments

    return tuple(field.name for one in (TaskArguments, DrGRPOConfig, ModelConfig) for field in dataclasses.fields(one))


def make_config(rng: random.Random) -> tuple[str, bytes]:
    base = rng.choice(CONFIGS)
    return ("sft" if base.name.startswith("sft") else "train"), mutated_yaml(base.read_bytes(), rng, setting_names())


def try_config(command: str, text: bytes) -> str | None:
    """The doctor reads the config as training does, and looks at more."""
    from trl_entropy import doctor

    with empty_folder() as folder:
        (folder / "config.yaml").write_bytes(text)
        (folder / "data").symlink_to(REPOSITORY.parent / "shared" / "data")
        options = ["--sft"] if command == "sft" else []
        return fault_of(lambda: doctor.main(["--config", "config.yaml", "--output_dir", "out", *options]))


# ---- data files


def make_data(rng: random.Random) -> tuple[str, bytes]:
    lines = "".join(json.dumps(record(i), ensure_ascii=False) + "\n" for i in range(24))
    return rng.choice(("train", "sft")), mutated_json_lines(lines.encode(), rng)


def try_data(command: str, text: bytes) -> str | None:
    """As far as training and fine-tuning read data, with what their `main` turns into one line."""
    from trl_entropy.config.settings_file import one_line
    from trl_entropy.models.embedded import build_tokenizer
    from trl_entropy.tasks.arguments import TaskArguments
    from trl_entropy.tasks.demonstrations import DemonstrationArguments, load_demonstrations
    from trl_entropy.tasks.registry import load_task

    def read() -> None:
        try:
            if command == "train":
                load_task(TaskArguments(task="gsm8k", dataset_name="data.jsonl"), build_tokenizer(), seed=0)
            else:
                task = DemonstrationArguments(task="gsm8k", dataset_name="data.jsonl")
                load_demonstrations(task, build_tokenizer(), seed=0)
        except (ValueError, OSError, ImportError, RuntimeError) as error:
            sys.exit(one_line(error))

    with empty_folder() as folder:
        (folder / "data.jsonl").write_bytes(text)
        return fault_of(read)


# ---- run directories

COMMANDS = ("load", "report", "evaluate", "archive", "resume")


def make_run(rng: random.Random, run: Path) -> tuple[str, dict[str, object]]:
    files = [str(path.relative_to(run)) for path in sorted(run.rglob("*")) if path.is_file()]
    how = rng.choice((*BYTES, *BYTES, "json", "json", "json", "gone", "a folder"))
    return rng.choice(COMMANDS), {"file": rng.choice(files), "how": how, "seed": rng.randrange(2**31)}


def damage(path: Path, how: str, seed: int) -> None:
    """Do to a file, which may be a hard link, what `how` says."""
    data, rng = path.read_bytes(), random.Random(seed)
    path.unlink()
    if how == "a folder":
        path.mkdir()
    elif how == "json":
        path.write_bytes(mutated_json_lines(data, rng))
    elif how != "gone":
        path.write_bytes(BYTES[how](data, rng))


def try_run(command: str, mutation: dict[str, object], run: Path) -> str | None:
    """The commands that read a run, on a copy with one damaged file."""
    with empty_folder() as folder:
        copy = folder / run.name
        shutil.copytree(run, copy, copy_function=os.link)
        if not (copy / str(mutation["file"])).exists():
            return None  # of a run with other files
        damage(copy / str(mutation["file"]), str(mutation["how"]), int(str(mutation["seed"])))
        return fault_of(lambda: _read_run(command, copy))


def _read_run(command: str, run: Path) -> None:
    from trl_entropy import archive, doctor, evaluate, report

    if command == "report":
        report.main([str(run)])
    elif command == "evaluate":
        with mock.patch.object(evaluate, "_evaluate", lambda *_: True):
            evaluate.main(["--run", str(run)])
    elif command == "archive":
        archive.main([str(run), "file:///" + str(run.parent / "archive").lstrip("/")])
    elif command == "resume":
        config = str(REPOSITORY / "configs" / "quickstart.yaml")
        doctor.main(["--config", config, "--output_dir", str(run), "--resume_from_checkpoint", "latest"])
    else:
        _load(run)


def _load(run: Path) -> None:
    """What a notebook reads, and what `load_run` turns into an error of one line."""
    from trl_entropy.analysis.run import Run, load_run
    from trl_entropy.config.settings_file import one_line

    for name in [name for name in dir(Run) if not name.startswith("_")]:
        try:
            value = getattr(load_run(run), name)
            if name == "probe_steps":
                value("entropy")
        except ValueError as error:
            one_line(error)


# ---- the driver

KINDS = {"config": ".yaml", "data": ".jsonl", "run": ".json"}


def keep(folder: Path, kind: str, command: str, case: object, number: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{kind}-{command}-{number}{KINDS[kind]}"
    path.write_bytes(case if isinstance(case, bytes) else json.dumps(case).encode())


def main() -> None:
    """Try the cases; exit with status 1 if one ended as none should."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("--cases", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--run", type=Path, help="damage copies of this run instead of a new one of three steps")
    parser.add_argument("--found", type=Path, help="a folder for the cases that end with a traceback")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if args.kind == "run" and args.run is None:
            args.run = Path(folder).resolve() / "three-steps"
            train_and_evaluate(args.run, save_only_model=False, log_completions=True, num_completions_to_print=1)
        sys.exit(bool(try_cases(args)))


def try_cases(args: argparse.Namespace) -> Counter[str]:
    """Print how cases ended that should not have; how often each."""
    kinds: Counter[str] = Counter()
    for number in range(args.cases):
        rng = random.Random(f"{args.kind} {args.seed} {number}")
        if args.kind == "run":
            command, case = make_run(rng, args.run.resolve())
            fault = try_run(command, case, args.run.resolve())
        else:
            make, attempt = (make_config, try_config) if args.kind == "config" else (make_data, try_data)
            command, case = make(rng)
            fault = attempt(command, case)
        if fault:
            last = fault.strip().splitlines()[-1][:160]
            kinds[last] += 1
            print(f"{number} {command} {case if args.kind == 'run' else ''}: {fault if kinds[last] == 1 else last}")
            if args.found and kinds[last] <= 2:
                keep(args.found, args.kind, command, case, number)
    print(f"{args.cases} cases of {args.kind}, seed {args.seed}: {sum(kinds.values())} ended otherwise")
    return kinds


if __name__ == "__main__":
    main()
