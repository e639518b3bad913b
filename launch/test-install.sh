#!/usr/bin/env bash
# What a user without a clone has: builds the wheel from what git knows, installs it into fresh environments in a
# folder of their own, and runs the commands there. Usage: bash launch/test-install.sh [--lowest] [--keep FOLDER]
#   [analysis]  the base: no torch and no transformers; report, watch, best, archive, new, configs, all --help
#   [train]     torch first, then the versions of constraints.txt; the demo, train, doctor, evaluate, report
# --lowest takes the lowest versions that setup.cfg allows of what it names, as uv resolves them, instead.
# PYTHON chooses the interpreter, with ONLY=analysis the base alone: for interpreters for which there is no torch here.
# Needs a package index. Run by hand; docs/use/commands.md has the date and what was seen.
set -euo pipefail
clone="$(cd "$(dirname "$0")/.." && pwd)"
python="${PYTHON:-python3}" lowest='' folder=''
while [ $# -gt 0 ]; do
    case $1 in
        --lowest) lowest=1; shift ;;
        --keep) mkdir -p "$2"; folder="$(cd "$2" && pwd)"; shift 2 ;;
        *) sed -n 's/^# //p' "$0" | head -9; exit 2 ;;
    esac
done
if [ -z "$folder" ]; then folder="$(mktemp -d)"; trap 'rm -rf "$folder"' EXIT; fi
unset PYTHONPATH
export HF_HUB_OFFLINE=1 PIP_DISABLE_PIP_VERSION_CHECK=1 OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

say() { echo "== $*"; }
# From a copy of what git knows, so that nothing that lies about in the clone gets into the wheel.
wheel() {
    git -C "$clone" ls-files -z | (cd "$clone" && xargs -0 tar cf - ) | (mkdir -p "$folder/source" && tar xf - -C "$folder/source")
    "$python" -m pip wheel --quiet --no-deps --wheel-dir "$folder/wheel" "$folder/source"
    ls "$folder"/wheel/*.whl
}
# requirements EXTRA: what the wheel asks for, with this extra, a line each
requirements() {
    "$python" - "$built" "$1" <<'PYTHON'
import email, sys, zipfile
with zipfile.ZipFile(sys.argv[1]) as wheel:
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    asked = email.message_from_bytes(wheel.read(name)).get_all("Requires-Dist")
for line in asked:
    what, _, when = line.partition(";")
    if not when or f'extra == "{sys.argv[2]}"' in when:
        print(what.strip())
PYTHON
}
# environment NAME EXTRA: an environment with the wheel and this extra
environment() {
    "$python" -m venv "$folder/$1"
    local install=("$folder/$1/bin/python" -m pip install --quiet)
    if [ -n "$lowest" ]; then
        "${install[@]}" uv
        # What setup.cfg names is direct only if it is asked for by itself. UV_MORE: options of uv, as --find-links
        requirements "$2" > "$folder/$1.in"
        "$folder/$1/bin/uv" pip install --quiet --python "$folder/$1/bin/python" --resolution lowest-direct \
            ${UV_MORE:-} -r "$folder/$1.in"
        "${install[@]}" --no-deps "$built"
    else
        [ "$2" != train ] || "${install[@]}" -c "$clone/constraints.txt" torch
        "${install[@]}" -c "$clone/constraints.txt" "trl_entropy[$2] @ file://$built"
    fi
    PATH="$folder/$1/bin:$given_path"
    "$folder/$1/bin/python" -m pip freeze | grep -viE '^(nvidia|cuda)' > "$folder/$1.txt"
    say "$1: $("$folder/$1/bin/python" --version), $(wc -l < "$folder/$1.txt") packages, in $folder/$1.txt"
}
helps() { for name in $(trl-entropy | sed -n 's/^  \([a-z-]*\) .*/\1/p'); do trl-entropy "$name" --help > help.txt || { cat help.txt; exit 1; }; done; }

given_path="$PATH"
say "the wheel"
built="$(wheel)"
mkdir -p "$folder/work" && cd "$folder/work"

say "[analysis]"
environment analysis analysis
python -c '
import importlib.util, sys
there = [name for name in ("torch", "transformers", "trl", "datasets", "accelerate") if importlib.util.find_spec(name)]
sys.exit(f"the base has brought {there}" if there else 0)'
helps
trl-entropy configs > configs.txt && trl-entropy new my-task
if trl-entropy train --config quickstart 2> error.txt; then echo "train runs without its extra"; exit 1; fi
grep -F "pip install 'trl_entropy[train]'" error.txt
run="${RUN:-}"
if [ "${ONLY:-}" != analysis ]; then
    say "[train]"
    environment train train
    helps
    trl-entropy doctor --config quickstart
    trl-entropy train --config quickstart --max_steps 2 --output_dir runs/two --report_to none
    trl-entropy report runs/two
    say "the demo, as it stands"
    trl-entropy demo
    run=runs/quickstart
    say "[analysis] reads what [train] has left"
    PATH="$folder/analysis/bin:$given_path"
fi
if [ -n "$run" ]; then
    trl-entropy report "$run" && trl-entropy watch "$run" --once && trl-entropy best "$run"
    trl-entropy archive "$run" "file://$folder/archive"
fi
say "all passed"
