#!/usr/bin/env bash
# Warm start, 60 steps of Dr-GRPO on the embedded task, held-out evaluation before and after, a figure.
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
# Threads that sleep while they wait: spinning ones get up to ten times slower when something else wants their core.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-2}" OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-passive}"
echo "== Training (configs/quickstart.yaml): under three minutes on two idle cores"
accelerate launch --config_file launch/cpu.yaml -m trl_entropy.train --config configs/quickstart.yaml "$@"
