#!/usr/bin/env bash
# Builds the site into build/site/; a warning is an error, and so is a word that codespell knows to be misspelt. Usage: bash launch/docs.sh [--serve]
# Installs what the extra `docs` of setup.cfg names into .venv-docs at the first start, without torch: docstrings are
# read, not imported. Afterwards it needs no network. VENV chooses another environment, PYTHON the interpreter.
set -euo pipefail
cd "$(dirname "$0")/.."
venv="${VENV:-.venv-docs}"
stamp="$venv/installed-$(cksum < setup.cfg | cut -d' ' -f1)"
if [ ! -e "$stamp" ]; then
    echo "== Installing into $venv (the first time)"
    [ -x "$venv/bin/python" ] || "${PYTHON:-python3}" -m venv "$venv"
    "$venv/bin/python" - <<'PYTHON' > "$venv/requirements.txt"
import configparser
parser = configparser.ConfigParser()
parser.read("setup.cfg")
print(parser["options.extras_require"]["docs"])
PYTHON
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -r "$venv/requirements.txt"
    touch "$stamp"
fi
"$venv/bin/codespell" docs ./*.md launch/README.md --skip "*.js,*.png"
export NO_MKDOCS_2_WARNING=1
if [ "${1:-}" = "--serve" ]; then exec "$venv/bin/mkdocs" serve; fi
"$venv/bin/mkdocs" build --strict --clean
# What a browser would fetch from elsewhere when a page is read; links that one clicks are no assets.
if grep -rnoE '<(script|link|img|iframe)[^>]+(src|href)="?https?://[^" >]+' build/site --include=*.html; then
    echo "== These assets are on other machines; the site must work offline"; exit 1
fi
echo "build/site/index.html"
