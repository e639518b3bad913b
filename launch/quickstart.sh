#!/usr/bin/env bash
# Warm start, 60 steps of Dr-GRPO on the embedded task with every probe, evaluation of the checkpoints, and a report.
# Usage: bash launch/quickstart.sh [--seed 1] [any field of configs/quickstart.yaml]
# Writes runs/quickstart/; an existing run is renamed first. Needs no GPU and no Hugging Face hub.
set -euo pipefail
. "$(dirname "$0")/environment.sh"

run=runs/quickstart
if [ -e "$run" ]; then
    aside="$run-$(date -r "$run" +%Y-%m-%d_%H-%M-%S)"
    echo "== $run exists already: renaming it to $aside"
    mv "$run" "$aside"
fi
# One thread: a second one gains little for a model of this size, and threads that wait for each other become many
# times slower if another program needs their core.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
echo "== Training (configs/quickstart.yaml): about three minutes on two idle cores"
accelerate launch --config_file launch/cpu.yaml -m trl_entropy.train --config configs/quickstart.yaml \
    --entropy_attribution token --noise_scale_probe True --noise_scale_probe_every 5 \
    --fisher_probe True --fisher_probe_every 20 "$@"
echo "== Evaluation of the checkpoints, and report"
trl-entropy evaluate --run "$run"
trl-entropy report "$run"
