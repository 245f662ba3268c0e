#!/usr/bin/env bash
# All checks: format, lint, types, tests. Makes .venv at its first run.
#   bash scripts/test.sh             everything, with a SLURM of its own, which root installs where it is missing; 12 minutes on two cores
#   bash scripts/test.sh --fast      for who changes a line: neither SLURM nor launchers, and no other test of more than some seconds
#   bash scripts/test.sh -k masking  other arguments go to pytest, those behind --fast too
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/setup.sh
chosen=()
if [ "${1-}" = --fast ]; then
  shift
  chosen=(-m "not slow and not slurm")
elif [ ! -x /usr/sbin/slurmctld ] || [ ! -x /usr/sbin/munged ] || [ ! -x /usr/bin/faketime ] || [ ! -x "$(command -v ip)" ]; then
  install=(apt-get install --yes --no-install-recommends slurm-wlm munge faketime iproute2 procps)
  [ "$(id -u)" = 0 ] || { echo "error: the tests need a SLURM of their own (or --fast): sudo apt-get update && sudo ${install[*]}" >&2; exit 2; }
  { apt-get update && DEBIAN_FRONTEND=noninteractive "${install[@]}"; } >/tmp/kantai-apt.log 2>&1 || { tail -n 5 /tmp/kantai-apt.log >&2; exit 2; }
fi
ruff format --check --quiet . || { echo "error: not formatted; run .venv/bin/ruff format ." >&2; exit 1; }
ruff check --quiet .
mypy --no-error-summary
pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder "${chosen[@]}" "$@" # most of a test is one process that starts
