# Both templates source this first. It does not set -e: the templates check exit codes themselves.
# shellcheck shell=bash
set -uo pipefail

say() { echo "[$(date '+%F %T')] $*"; }
fail() { say "error: $1" >&2; exit "${2:-2}"; }

mapfile -d '' -t submitted_with < <(env -0) # the environment without the site's settings
# sbatch --export=... is meant for this script. Steps would inherit it, and lack PATH.
export SLURM_EXPORT_ENV=ALL
export SLURM_TIME_FORMAT=standard # date may not be able to read the user's format
# The scripts of activate.d and modules may read variables that are not set. -a exports the
# site's settings to the steps.
set +u -a
. "${KANTAI_SITE:-slurm/site.env}" || fail "cannot read slurm/site.env"
set -u +a

# This job's id for SLURM's commands. An array's job id stands for all elements, and is also the id
# of one of them.
this=${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}
# Retry for five minutes: slurmctld may restart.
patiently() { for _ in {1..20}; do "$@" && return; sleep 15; done; return 1; }
# Print a field of `scontrol show job`, such as EndTime; nothing for (null).
of_job() {
  patiently scontrol --oneliner show job "$this" |
    sed -nE "/ $1=/{s/.* $1=([^ ]*).*/\1/; s/^\(null\)$//; p}"
}
requeueable() { [ "$(of_job Requeue)" = 1 ]; }
# Requeue the job, which ends this script. Return if the job cannot be requeued.
requeue() {
  requeueable || return
  trap '' USR1
  trap 'exit 75' TERM # exit at once: SLURM frees the nodes when the script has ended
  say "requeued"
  patiently scontrol requeue "$this" || return
  sleep infinity &
  wait
}
