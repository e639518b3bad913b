#!/usr/bin/env bash
# Static checks and tests. Usage: bash launch/test.sh [--slow] [pytest arguments]
# Without --slow: at most 12 minutes on two idle cores. With it: the long tests too, at most 40.
set -euo pipefail
EXTRAS=dev,deepspeed
. "$(dirname "$0")/environment.sh"

selection="not slow and not gpu"
if [ "${1:-}" = "--slow" ]; then selection="not gpu"; shift; fi
export OMP_NUM_THREADS=1
echo "== ruff, import-linter, mypy"
ruff check . && ruff format --check .
lint-imports
mypy
echo "== pytest -m '$selection'"
python -m pytest -m "$selection" "$@"
