#!/usr/bin/env bash
# Warm start, 60 steps of Dr-GRPO on the embedded task with every probe, its checkpoints evaluated, a page about it.
# Usage: bash launch/quickstart.sh [--seed 1] [any field of configs/quickstart.yaml]
# Leaves runs/quickstart/ (a run that is there already is moved aside). Needs no GPU and no hub.
set -euo pipefail
. "$(dirname "$0")/environment.sh"

run=runs/quickstart
if [ -e "$run" ]; then
    aside="$run-$(date -r "$run" +%Y-%m-%d_%H-%M-%S)"
    echo "== $run is there already: moved to $aside"
    mv "$run" "$aside"
fi
# One thread: a second one gains little at this size, and threads that wait for each other get many times slower when
# something else wants their core.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
echo "== Training (configs/quickstart.yaml): about three minutes on two idle cores"
accelerate launch --config_file launch/cpu.yaml -m trl_entropy.train --config configs/quickstart.yaml \
    --entropy_attribution token --noise_scale_probe True --noise_scale_probe_every 5 \
    --fisher_probe True --fisher_probe_every 20 "$@"
echo "== Evaluation of its checkpoints, and the page"
trl-entropy evaluate --run "$run"
trl-entropy report "$run"
