#!/usr/bin/env bash
# All checks: format, lint, types, tests. Makes .venv at its first run. Arguments go to pytest: bash scripts/test.sh -k masking
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/setup.sh
ruff format --check --quiet . || { echo "error: not formatted; run .venv/bin/ruff format ." >&2; exit 1; }
ruff check --quiet .
mypy --no-error-summary
pytest --numprocesses 2 --dist loadfile "$@" # most of a test is one process that starts
