# pretrain.sbatch sources this when bad nodes ($bad) leave too few. SLURM cannot exclude nodes from
# a running job. It can exclude them from waiting jobs, which are the next links of a chain. Any
# other job is submitted again, with the same environment, arguments and options.
# shellcheck shell=bash disable=SC2154
excluded=$(of_job ExcNodeList)
excluded=${excluded:+$excluded,}$bad
if [ -n "${SLURM_ARRAY_TASK_ID:-}" ]; then
  # scontrol also prints the links that it could not change: this one and those before it.
  scontrol update jobid="$SLURM_ARRAY_JOB_ID" excnodelist="$excluded"
  fail "the links that still wait exclude $excluded; \
if none waits, submit the chain again with --exclude=$excluded" 75
fi
# How often the job was submitted again in a row, and at which step.
read -r times at <<<"${RESUBMITTED:-0 0}"
[ "$at" = "$before" ] || times=0
[ "$times" -le "$MAX_FRUITLESS" ] || fail "gave up: too many bad nodes: $excluded" 1
requeueable && requeue=--requeue || requeue=--no-requeue
features=$(of_job Features)
env -i "${submitted_with[@]}" \
  RESUBMITTED="$((times + 1)) $before" SLURM_RESTART_COUNT=0 "$(type -P sbatch)" \
  --exclude="$excluded" --nodes="$least-$SLURM_JOB_NUM_NODES" \
  --job-name="$SLURM_JOB_NAME" "$requeue" \
  --partition="$SLURM_JOB_PARTITION" --time="$(of_job TimeLimit)" \
  ${features:+--constraint="$features"} \
  ${SLURM_JOB_ACCOUNT:+--account="$SLURM_JOB_ACCOUNT"} \
  ${SLURM_JOB_QOS:+--qos="$SLURM_JOB_QOS"} \
  ${SLURM_JOB_RESERVATION:+--reservation="$SLURM_JOB_RESERVATION"} \
  ${gpus_per_node:+--gpus-per-node="$gpus_per_node"} \
  --output="$LOGS/%x-%j.out" slurm/pretrain.sbatch "${arguments[@]}" ||
  fail "submit it again with --exclude=$excluded" 1
exit 75
