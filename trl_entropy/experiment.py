"""Experiments on what a run left behind: `trl-entropy experiment NAME [options]`."""

from __future__ import annotations

import importlib
import sys

EXPERIMENTS = {
    "agreement": "predicted against measured over runs with every step probed, by thirds; reads metrics only",
    "kernel": "Fisher kernels and spectra of single steps, noise scale, predicted against measured; reads files only",
    "linearity": "how far does first order hold? The step that AdamW would make, shorter and longer",
    "conditioning": "SGD, RMSprop, AdamW with and without momentum: entropy change, alignment, shares",
    "exchange": "what keeping entropy costs in reward: steps of none, lower lr, bonus, Clip-Cov, entropy control",
    "influence": "which update completion moves which probe completion; row sums are the attribution",
    "calibration": "are the stated error bars right? Coverage over redraws at a fixed checkpoint",
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
