#!/usr/bin/env bash
# Contracts and trainer tests with other versions of the packages that numbers depend on, each tried alone beside the
# pinned ones. Usage: bash launch/test-versions.sh [--slow] [PACKAGE==VERSION ...]
# Two that belong together are joined by a comma: torch==2.11.0,transformers==5.17.0.
# Without names: the ends of the ranges of setup.cfg that are not pinned. --slow adds the tests that start two processes
# under every engine, DeepSpeed's among them. A version takes 3 minutes on an idle core, with --slow 4 more; another
# version of torch is a download of 2 to 3 GB first.
set -uo pipefail
EXTRAS=dev,deepspeed
. "$(dirname "$0")/environment.sh"

tests=(tests/contracts tests/trainer/test_trainer.py tests/trainer/test_next_rollouts.py tests/trainer/test_resume.py)
marks="not slow and not gpu"
if [ "${1:-}" = "--slow" ]; then shift; tests+=(tests/distributed/test_trainers_ranks.py); marks="not gpu"; fi
[ $# -gt 0 ] || set -- transformers==5.22.2 transformers==5.24.0 pandas==3.0.0
export OMP_NUM_THREADS=1

# Before .venv on Python's path: only this package is another one. What it needs itself is .venv's, but for torch's
# libraries of CUDA, each version's own: a package index has no build of torch for a CPU alone.
install() {
    local spec="$1" place="$PWD/.versions/$1" only=(--no-deps)
    [ ! -e "$place/installed" ] || return 0
    mkdir -p "$place"
    if [[ $spec = torch==* ]]; then
        python -m pip freeze --exclude-editable | grep -v '^torch==' > "$place/beside.txt"
        only=(-c "$place/beside.txt")
    fi
    python -m pip install --quiet --disable-pip-version-check --no-compile "${only[@]}" --target "$place" "$spec" \
        && touch "$place/installed"
}

failed=
for spec in "$@"; do
    path=
    for one in ${spec//,/ }; do
        install "$one" || exit 1
        path="$path$PWD/.versions/$one:"
    done
    echo "== $spec"
    of_spec=("${tests[@]}")
    case $spec in pandas*) of_spec+=(tests/analysis) ;; esac
    PYTHONPATH="$path$PWD" nice python -m pytest -q -m "$marks" "${of_spec[@]}" || failed="$failed $spec"
done
[ -z "$failed" ] || { echo "Failed:$failed"; exit 1; }
echo "All passed: $*"
