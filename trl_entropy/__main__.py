"""`trl-entropy NAME ...` runs `trl_entropy.NAME`'s `main`."""

from __future__ import annotations

import importlib
import sys

from trl_entropy._extras import what_to_install

COMMANDS = {
    "demo": "train a tiny model with every probe, evaluate it, and write a page: what the quickstart does",
    "convert-gguf": "turn a GGUF file into a folder that training can start from",
    "new": "write a folder with a task that runs: problems, a reward, a metric, a config and a test",
    "configs": "list the configs that the package brings, or print the path of one",
    "sft": "fine-tune a model on demonstrations, as the start of RL training",
    "train": "train with the settings of a config file (with accelerate launch for more than one process)",
    "doctor": "check a run before it starts: batch plan, memory, disk space, problems and what to do about them",
    "check-model": "try what the probes compute on a model, or on a small one of its family, and say what is right",
    "evaluate": "evaluate a run's checkpoints: pass@k, greedy accuracy, lengths and entropy, with intervals",
    "best": "say which evaluated checkpoint is the best, and which others cannot be told from it",
    "report": "draw the figures of a run and write an HTML page about it; --watch serves one that follows it",
    "watch": "follow a run in the terminal: curves, the parts of the last step, warnings, time left",
    "archive": "copy a run to s3:// or another store, and verify the copy",
    "experiment": "test the estimators on a checkpoint of a run",
}


def main() -> None:
    """Run the command named first on the command line."""
    if len(sys.argv) < 2 or sys.argv[1] not in COMMANDS:
        lines = "\n".join(f"  {name:<13} {text}" for name, text in COMMANDS.items())
        print(f"usage: trl-entropy COMMAND [options]\n\n{lines}\n\ntrl-entropy COMMAND --help shows its options.")
        sys.exit(0 if sys.argv[1:] in ([], ["-h"], ["--help"]) else f"trl-entropy: no command {sys.argv[1]!r}")
    try:
        module = importlib.import_module(f"trl_entropy.{sys.argv[1].replace('-', '_')}")
        module.main(sys.argv[2:])
    except ModuleNotFoundError as error:
        if (remedy := what_to_install(error)) is None:
            raise
        if {"-h", "--help"} & {*sys.argv[2:]}:
            print(f"trl-entropy {sys.argv[1]}: {COMMANDS[sys.argv[1]]}.\n\nIts options need a package: {remedy}.")
            sys.exit(0)
        sys.exit(f"Error: trl-entropy {sys.argv[1]}: {remedy}.")


if __name__ == "__main__":
    main()
