# Sourced by quickstart.sh, smollm2.sh and test.sh: makes .venv with the pinned versions, once, and activates it.
# EXTRAS (e.g. "dev,deepspeed") are the optional dependencies to install. PYTHON chooses the interpreter.
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON="${PYTHON:-python3}"
"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed; set PYTHON."; exit 1; }
EXTRAS="${EXTRAS:-}"
stamp=".venv/installed-$(cat setup.cfg constraints.txt | cksum | cut -d' ' -f1)-${EXTRAS//,/-}"
if [ ! -e "$stamp" ]; then
    echo "== Installing into .venv (the versions of constraints.txt; a few minutes the first time)"
    [ -x .venv/bin/python ] || "$PYTHON" -m venv .venv
    # torch first, so that no other package installs a newer build of it.
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[train${EXTRAS:+,$EXTRAS}]"
    .venv/bin/python -c 'import torch, trl, trl_entropy'
    touch "$stamp"
fi
. .venv/bin/activate
# Probes need tensors of other sizes than training: on a GPU, memory segments that grow leave no gaps between them.
[ -n "${PYTORCH_CUDA_ALLOC_CONF:-}" ] || export PYTORCH_ALLOC_CONF="${PYTORCH_ALLOC_CONF:-expandable_segments:True}"
export HF_HUB_OFFLINE="${HF_HUB_OFFLINE:-1}" TOKENIZERS_PARALLELISM=false PYTHONWARNINGS="${PYTHONWARNINGS:-ignore}"
