# What pretrain.sbatch does where bad nodes ($bad) leave too few; it sources this. SLURM changes no running job's excluded nodes, but those of
# jobs that wait: of a chain, they are the next links. Any other job is handed in once more, as it was.
# shellcheck shell=bash disable=SC2154
excluded=$(of_job ExcNodeList)
excluded=${excluded:+$excluded,}$bad
if [ -n "${SLURM_ARRAY_TASK_ID:-}" ]; then
  scontrol update jobid="$SLURM_ARRAY_JOB_ID" excnodelist="$excluded" # says also which links could not be told: this one, and those before
  fail "links that still wait do without $excluded; where none does, submit the chain again with --exclude=$excluded" 75
fi
read -r times at <<<"${RESUBMITTED:-0 0}" # how often in a row, before the same step
[ "$at" = "$before" ] || times=0
[ "$times" -le "$MAX_FRUITLESS" ] || fail "gave up: too many bad nodes: $excluded" 1
requeueable && requeue=--requeue || requeue=--no-requeue
features=$(of_job Features)
env -i "${submitted_with[@]}" RESUBMITTED="$((times + 1)) $before" SLURM_RESTART_COUNT=0 "$(type -P sbatch)" \
  --exclude="$excluded" --nodes="$least-$SLURM_JOB_NUM_NODES" --job-name="$SLURM_JOB_NAME" "$requeue" \
  --partition="$SLURM_JOB_PARTITION" --time="$(of_job TimeLimit)" ${features:+--constraint="$features"} \
  ${SLURM_JOB_ACCOUNT:+--account="$SLURM_JOB_ACCOUNT"} ${SLURM_JOB_QOS:+--qos="$SLURM_JOB_QOS"} \
  ${SLURM_JOB_RESERVATION:+--reservation="$SLURM_JOB_RESERVATION"} ${gpus_per_node:+--gpus-per-node="$gpus_per_node"} \
  --output="$LOGS/%x-%j.out" slurm/pretrain.sbatch "${arguments[@]}" ||
  fail "submit it again with --exclude=$excluded" 1
exit 75
