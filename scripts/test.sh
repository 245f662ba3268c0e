#!/usr/bin/env bash
# All checks: format, lint, types, tests. Makes .venv at its first run.
#   bash scripts/test.sh             everything, with a real SLURM on this machine
#   bash scripts/test.sh --fast      no SLURM, no launchers, nothing else that takes seconds
#   bash scripts/test.sh -k masking  other arguments go to pytest, also behind --fast
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/setup.sh

chosen=()
if [ "${1-}" = --fast ]; then
  shift
  chosen=(-m "not slow and not slurm")
elif ! [ -x /usr/sbin/slurmctld ] || ! [ -x /usr/sbin/munged ] || ! [ -x /usr/bin/faketime ] ||
  ! type -P ip >/dev/null; then
  install=(apt-get install --yes --no-install-recommends slurm-wlm munge faketime iproute2 procps)
  if [ "$(id -u)" != 0 ]; then
    echo "error: the tests need a SLURM of their own (--fast does not):" \
      "sudo apt-get update && sudo ${install[*]}" >&2
    exit 2
  fi
  log=$(mktemp)
  { apt-get update && DEBIAN_FRONTEND=noninteractive "${install[@]}"; } >"$log" 2>&1 ||
    { tail -n 5 "$log" >&2; exit 2; }
  rm "$log"
fi
ruff format --check --quiet . || {
  echo "error: not formatted; run .venv/bin/ruff format ." >&2
  exit 1
}
ruff check --quiet .
mypy --no-error-summary
# Most of a test is one process that starts, so two tests run at once.
pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder ${chosen[@]+"${chosen[@]}"} "$@"
