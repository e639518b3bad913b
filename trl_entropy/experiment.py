"""Experiments on a run directory or a checkpoint: `trl-entropy experiment NAME [options]`."""

from __future__ import annotations

import importlib
import sys

EXPERIMENTS = {
    "agreement": "predicted against measured entropy changes over whole runs; reads the metrics only",
    "kernel": "Fisher kernels and spectra of single steps, and how well they predict a step; reads files only",
    "linearity": "how far does the first-order prediction hold? AdamW's next step, made shorter and longer",
    "conditioning": "what does the preconditioner do to the entropy? Steps by SGD, RMSprop and AdamW",
    "exchange": "what does it cost in reward to keep entropy? Steps by several methods of entropy control",
    "influence": "which completion of the step changes which completion of a probe batch, and by how much?",
    "calibration": "are the stated error bars right? Coverage over many redraws at one checkpoint",
}


def main(argv: list[str] | None = None) -> None:
    """Run the experiment named first on the command line."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] not in EXPERIMENTS:
        lines = "\n".join(f"  {name:<12} {text}" for name, text in EXPERIMENTS.items())
        print(f"usage: trl-entropy experiment NAME [options]\n\n{lines}\n\n--help after a NAME shows its options.")
        sys.exit(0 if argv in ([], ["-h"], ["--help"]) else f"trl-entropy experiment: no experiment {argv[0]!r}")
    importlib.import_module(f"trl_entropy.experiments.{argv[0]}").main(argv[1:])


if __name__ == "__main__":
    main()
