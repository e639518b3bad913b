"""Experiments on a run directory or a checkpoint: `trl-entropy experiment NAME [options]`."""

from __future__ import annotations

import importlib
import sys

from trl_entropy.runs.file_errors import ending_in_one_line

EXPERIMENTS = {
    "agreement": "how well do predicted entropy changes agree with measured ones? Reads the metrics of whole runs",
    "predictors": "which formula predicts a step's entropy change? Published ones, the past and ours. Reads files",
    "claims": "do published claims hold here? Twelve of them, each with what would refute it. Trains small runs",
    "kernel": "Fisher kernels of single steps, their eigenvalues, and how well they predict the step. Reads files",
    "linearity": "up to which step size does the first-order prediction hold? AdamW's next step, scaled",
    "conditioning": "what does the preconditioner do to the entropy? Compares steps of SGD, RMSprop and AdamW",
    "exchange": "how much reward does keeping the entropy cost? Steps of several controls; or RUN: by kind of token",
    "branch": "how many prompts should a step have? Short trainings from a checkpoint at several numbers of prompts",
    "influence": "how much does each completion of the step change each completion of a probe batch?",
    "calibration": "are the standard errors right? Coverage of their intervals over many draws at one checkpoint",
}


@ending_in_one_line()
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
