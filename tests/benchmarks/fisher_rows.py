"""
Errors of a Fisher kernel (T12) whose rows are rounded to bf16, or sketched (T13) to several dimensions.

    python tests/benchmarks/fisher_rows.py RUN/checkpoint-N [RUN/checkpoint-N ...] [--seeds 20]

At each checkpoint the run's policy draws one more update batch. The rows are sqrt(M) grad S_i of its completions, with
the M of the step that AdamW would make. The reference is the Gram matrix of the float32 rows, multiplied in float64.
Errors of entries are relative to sqrt(K_ii K_jj), those of a whole Gram matrix are in the Frobenius norm; for sketches
the root mean square over seeds is shown.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from trl_entropy.engine.optimizer_step import metric_of_step
from trl_entropy.estimators.kernel.fisher_kernel import spectrum
from trl_entropy.estimators.kernel.row_kernels import blockwise_gram
from trl_entropy.estimators.kernel.sketch import CountSketch
from trl_entropy.estimators.rows.row_sums import Rows
from trl_entropy.estimators.statistics.u_statistic import cross_gram
from trl_entropy.experiments.checkpoint import Checkpoint
from trl_entropy.experiments.state import FixedState
from trl_entropy.gradients.sequence_products import consumed, weighted_logps
from trl_entropy.rollouts.completions import Completions
from trl_entropy.runs.console import quiet_libraries

DIMENSIONS = (100, 200, 400, 800, 1600, 3200, 6400, 12800)


def rows_at(checkpoint: Path) -> Tensor:
    """The rows (N, D) of the checkpoint's completions, float32."""
    with tempfile.TemporaryDirectory() as folder:
        state = FixedState(Checkpoint.read(checkpoint), Path(folder), seed=0)
        completions = Completions.of(state.rollouts)
        scale = {name: m.sqrt() for name, m in metric_of_step(state.context).items()}
        scores = weighted_logps(completions.completion_mask.double())
        with state.engine.scoring_model(state.before) as model:
            return consumed(
                model, completions, scores, lambda: Rows(len(completions), scale=scale), state.args.temperature, 64
            ).values


def errors(gram: Tensor, exact: Tensor) -> dict[str, float]:
    norms = exact.diagonal().sqrt()
    relative = (gram - exact) / norms.outer(norms)
    off_diagonal = relative[~torch.eye(len(exact), dtype=torch.bool)]
    found, true = spectrum(gram), spectrum(exact)
    return {
        "entry, worst": float(relative.abs().max()),
        "entry, rms": float(off_diagonal.square().mean().sqrt()),
        "diagonal, rms": float(relative.diagonal().square().mean().sqrt()),
        "Frobenius": float((gram - exact).norm() / exact.norm()),
        "trace": float(gram.trace() / exact.trace() - 1),
        "largest eigenvalue": float(found.eigenvalues[0] / true.eigenvalues[0] - 1),
        "effective rank": found.effective_rank / true.effective_rank - 1,
        "participation ratio": found.participation_ratio / true.participation_ratio - 1,
    }


def root_mean_square(tables: list[dict[str, float]]) -> dict[str, float]:
    return {name: (sum(table[name] ** 2 for table in tables) / len(tables)) ** 0.5 for name in tables[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", type=Path, nargs="+")
    parser.add_argument("--seeds", type=int, default=20)
    options = parser.parse_args()
    quiet_libraries()
    for checkpoint in options.checkpoints:
        rows = rows_at(checkpoint)
        exact = cross_gram(rows, rows)
        spread = spectrum(exact)
        print(
            f"{checkpoint}: {len(rows)} rows of {rows.shape[1]}; effective rank {spread.effective_rank:.1f}, "
            f"participation ratio {spread.participation_ratio:.1f}"
        )
        rounded = rows.bfloat16().float()
        tables = {
            "float32": errors(blockwise_gram(rows, rows), exact),
            "bf16": errors(cross_gram(rounded, rounded), exact),
        }
        for dim in DIMENSIONS:
            sketches = [CountSketch(dim, seed).block(rows, "all") for seed in range(options.seeds)]
            tables[f"sketch {dim}"] = root_mean_square([errors(s @ s.T, exact) for s in sketches])
        print(f"| rows | {' | '.join(tables['bf16'])} |")
        print("|---" * (1 + len(tables["bf16"])) + "|")
        for name, table in tables.items():
            print(f"| {name} | {' | '.join(f'{value:.2g}' for value in table.values())} |", flush=True)


if __name__ == "__main__":
    main()
