#!/usr/bin/env bash
# Static checks and tests. Usage: bash launch/test.sh [--slow] [pytest arguments]
# Takes 7 to 15 minutes on two cores, --slow another 24 to 60, by how fast they are that day (2026-12-01).
# Tests run in random order; the first line that pytest prints has the seed, with which --randomly-seed=SEED repeats it.
set -euo pipefail
EXTRAS=dev,deepspeed
. "$(dirname "$0")/environment.sh"

slow=
if [ "${1:-}" = "--slow" ]; then slow=1; shift; fi
export OMP_NUM_THREADS=1
# The tests of launch/sync.sh need rsync and sshd; if these cannot be installed, the tests are skipped with a reason.
tools() { command -v rsync && PATH="$PATH:/usr/sbin" command -v sshd && [ -d /run/sshd ]; }
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null && ! tools >/dev/null; then
    echo "== Installing rsync and sshd for the tests of launch/sync.sh"
    mkdir -p /run/sshd
    { timeout 120 apt-get -qq update && DEBIAN_FRONTEND=noninteractive timeout 180 apt-get -qq install \
        --no-install-recommends rsync openssh-client openssh-server; } >/dev/null 2>&1 || echo "   not possible here"
fi
# The page is tested in headless Chromium; without it these tests are skipped with a reason.
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null && ! command -v chromium >/dev/null; then
    echo "== Installing chromium for the tests of the page"
    { timeout 120 apt-get -qq update && DEBIAN_FRONTEND=noninteractive timeout 300 apt-get -qq install \
        --no-install-recommends chromium; } >/dev/null 2>&1 || echo "   not possible here"
fi
echo "== ruff, import-linter, mypy"
ruff check . && ruff format --check .
lint-imports
mypy
bash launch/page.sh
echo "== pytest, two processes"
python -m pytest -m "not slow and not gpu" -n 2 --dist loadfile "$@"
if [ -n "$slow" ]; then
    echo "== pytest, the long tests, two processes; some start processes of their own"
    python -m pytest -m "slow and not gpu" -n 2 --dist loadfile "$@"
fi
