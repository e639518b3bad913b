#!/usr/bin/env bash
# Formatter and type check (JSDoc) of the page's script, with pinned tools from npm. Usage: bash launch/page.sh [--write]
# Needs node and the npm registry; without them it says so and succeeds, since the page itself needs neither.
set -euo pipefail
cd "$(dirname "$0")/.."
sources=trl_entropy/reporting/browser
if ! command -v npx >/dev/null; then echo "== node is not here: the page's script is not checked"; exit 0; fi
tools="$(mktemp -d)"
trap 'rm -rf "$tools"' EXIT
if ! timeout 120 npm install --silent --no-fund --no-audit --prefix "$tools" prettier@3.10.1 typescript@7.0.2 >/dev/null 2>&1; then
    echo "== the npm registry is out of reach: the page's script is not checked"; exit 0
fi
echo "== prettier, tsc: the page's script"
mode=--check; if [ "${1:-}" = "--write" ]; then mode=--write; fi
"$tools/node_modules/.bin/prettier" --log-level warn --print-width 119 "$mode" "$sources/*.js" "$sources/*.css"
"$tools/node_modules/.bin/tsc" --allowJs --checkJs --noEmit --strict --target es2022 --lib es2023,dom,dom.iterable \
    --module es2022 --moduleResolution bundler "$sources/main.js"
