#!/usr/bin/env bash
# Checks on one GPU whatever may go otherwise there than on a CPU, then measures seconds, ratio and peak memory of every
# probe and control at Qwen2.5-1.5B's shape. Takes at most ten minutes, and no network.
# Usage: bash launch/gpu-check.sh [--output DIR] [--only TEXT] [--minutes 10] [--device cpu]
# Writes DIR/gpu-check.md, which can go into docs/results/diary.md as it is, and DIR/gpu-check.json (DIR: runs/gpu-check).
# Exit status: 1 if a check fails, 2 if nothing can be checked.
#
# Python: PYTHON if it is set, else .venv/bin/python if there is one, else python3. It needs what setup.cfg asks for;
# rows that need deepspeed are skipped without it. Packages that a machine lacks can be carried as wheels: what lies in
# .whl/ (or WHEELS) is installed into a temporary folder for this run, without asking an index. For an image that has
# torch, transformers, accelerate, peft, pandas, pyarrow, jaxtyping, tensorboard and pytest, on a machine with a network:
#   pip download --no-deps --only-binary=:all: --python-version 3.12 --implementation cp --abi cp312 --abi abi3 --abi none \
#       --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 --platform any -d .whl trl==1.16.0 datasets==5.2.0 \
#       "multiprocess<0.70.20" "dill<0.4.2" hjson pydantic pydantic-core annotated-types typing-inspection beartype
#   pip wheel --no-deps --no-build-isolation -w .whl deepspeed==0.19.8     # where torch is; it has no wheel on the index
# (6 MB). math-verify, vLLM, bitsandbytes and a tokenizer from a hub are not needed.
# With another version of torch or transformers than that of constraints.txt a warning says so, and rows may fail.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python="${PYTHON:-}"
[ -n "$python" ] || { [ -x .venv/bin/python ] && python=.venv/bin/python || python=python3; }
export PYTHONPATH="$PWD:$PWD/tests${PYTHONPATH:+:$PYTHONPATH}"
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONWARNINGS="${PYTHONWARNINGS:-ignore}"
wheels="${WHEELS:-.whl}"
if compgen -G "$wheels/*.whl" >/dev/null; then
    site=$(mktemp -d)
    trap 'rm -rf "$site"' EXIT
    "$python" -m pip install --quiet --disable-pip-version-check --no-index --no-deps --no-compile --target "$site" "$wheels"/*.whl
    export PYTHONPATH="$site:$PYTHONPATH"
fi
"$python" -m tests.devices.gpu_check "$@"
