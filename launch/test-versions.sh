#!/usr/bin/env bash
# Contracts and trainer tests with other versions of the packages that numbers depend on, each tried alone beside the
# pinned ones. Usage: bash launch/test-versions.sh [--slow] [PACKAGE==VERSION ...]
# Without names: the ends of the ranges of setup.cfg. --slow adds the tests that start two processes under every engine,
# DeepSpeed's among them. A version takes 3 minutes on an idle core, with --slow 4 more.
set -uo pipefail
EXTRAS=dev,deepspeed
. "$(dirname "$0")/environment.sh"

tests=(tests/contracts tests/trainer/test_trainer.py tests/trainer/test_next_rollouts.py tests/trainer/test_resume.py)
marks="not slow and not gpu"
if [ "${1:-}" = "--slow" ]; then shift; tests+=(tests/distributed/test_trainers_ranks.py); marks="not gpu"; fi
[ $# -gt 0 ] || set -- transformers==5.22.2 transformers==5.24.0 pandas==3.0.0
export OMP_NUM_THREADS=1

failed=
for spec in "$@"; do
    place="$PWD/.versions/$spec"
    # Before .venv on Python's path: only this package is another one. What it needs itself is .venv's.
    if [ ! -e "$place/installed" ]; then
        python -m pip install --quiet --disable-pip-version-check --no-deps --target "$place" "$spec" || exit 1
        touch "$place/installed"
    fi
    echo "== $spec"
    of_spec=("${tests[@]}")
    case $spec in pandas*) of_spec+=(tests/analysis) ;; esac
    PYTHONPATH="$place:$PWD:$PWD/tests" nice python -m pytest -q -m "$marks" "${of_spec[@]}" || failed="$failed $spec"
done
[ -z "$failed" ] || { echo "Failed:$failed"; exit 1; }
echo "All passed: $*"
