# What both templates begin with; they source it. Not -e: what ends badly is looked at.
# shellcheck shell=bash
set -uo pipefail

say() { echo "[$(date '+%F %T')] $*"; }
fail() { say "error: $1" >&2; exit "${2:-2}"; }

mapfile -d '' -t submitted_with < <(env -0)      # the environment, before the site's settings are in it
export SLURM_EXPORT_ENV=ALL                      # sbatch --export=... is meant for this script; steps would inherit it, and lack PATH
export SLURM_TIME_FORMAT=standard                # a user's own may be one that date does not read
set +u -a # what activate.d and modules run may read variables that are not set; what the site sets is for the steps, too
. "${KANTAI_SITE:-slurm/site.env}" || fail "cannot read slurm/site.env"
set -u +a

# What SLURM is asked about: of an array, this element alone. (One of them has the array's own job id, which stands for all.)
this=${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}
patiently() { for _ in {1..20}; do "$@" && return; sleep 15; done; return 1; } # slurmctld may be away for some minutes
# A field of `scontrol show job`, such as EndTime; nothing for (null).
of_job() { patiently scontrol --oneliner show job "$this" | sed -nE "/ $1=/{s/.* $1=([^ ]*).*/\1/; s/^\(null\)$//; p}"; }
requeueable() { [ "$(of_job Requeue)" = 1 ]; }
# Give the job back to SLURM, which ends this script; comes back where it cannot be requeued.
requeue() {
  requeueable || return
  trap '' USR1
  trap 'exit 75' TERM # at once: the nodes are not free before
  say "requeued"
  patiently scontrol requeue "$this" || return
  sleep infinity &
  wait
}
