"""
What the quickstart does, from an installed package: `trl-entropy demo`.

Trains a tiny model in the config `quickstart` with every probe, evaluates its checkpoints, and writes a page about it.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from trl_entropy.runs.file_errors import check_writable, ending_in_one_line, existing_parent

RUN = Path("runs/quickstart")
# As launch/quickstart.sh has them; a test compares the two.
SETTINGS = (
    *("--config", "quickstart", "--entropy_attribution", "token"),
    *("--noise_scale_probe", "True", "--noise_scale_probe_every", "5"),
    *("--fisher_probe", "True", "--fisher_probe_every", "20"),
)
# One thread: a second one gains little for a model of this size, and threads that wait for each other become many
# times slower if another program needs their core.
_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONWARNINGS": "ignore",
}  # fmt: skip


@ending_in_one_line()
def main(argv: list[str] | None = None) -> None:
    """Train, evaluate, report; what follows on the command line are settings of the training."""
    parser = argparse.ArgumentParser(
        prog="trl-entropy demo",
        usage="trl-entropy demo [--seed 1] [any setting of trl-entropy train]",
        description="Train a tiny model for 60 steps with every probe, evaluate it, and write a page about it, in "
        f"{RUN}. About four minutes on two cores; no GPU, no network. A run that is there is renamed first.",
    )
    settings = parser.parse_known_args(argv)[1]
    if any(word.startswith(("--output_dir", "--config")) for word in settings):
        parser.error(f"the demo has its own config and writes {RUN}: use trl-entropy train for another")
    import trl  # noqa: F401  what training needs is missed here, before a run is renamed

    check_writable(existing_parent(RUN))
    _set_aside()
    print("== Training: about three minutes on two idle cores", flush=True)
    _run("train", *SETTINGS, *settings)
    print("== Evaluation of the checkpoints, and report", flush=True)
    _run("evaluate", "--run", str(RUN))
    _run("report", str(RUN))
    print(f"open {RUN / 'report' / 'index.html'} in a browser")


def _set_aside() -> None:
    if RUN.exists():
        aside = RUN.with_name(f"{RUN.name}-{time.strftime('%Y-%m-%d_%H-%M-%S', time.localtime(RUN.stat().st_mtime))}")
        print(f"== {RUN} exists already: renaming it to {aside}")
        RUN.rename(aside)


def _run(command: str, *words: str) -> None:
    """The command in a process of its own, so that what it loads is gone when it ends; its failure is the demo's."""
    environment = {**_ENVIRONMENT, **os.environ}
    ended = subprocess.run(_python(command, words), env=environment, check=False).returncode
    if ended:
        sys.exit(ended)


def _python(command: str, words: Sequence[str]) -> list[str]:
    return [sys.executable, "-m", "trl_entropy", command, *words]


if __name__ == "__main__":
    main()
