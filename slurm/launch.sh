#!/bin/bash
# What srun starts once on every node: bash slurm/launch.sh BACKEND PROGRAM ... It starts itself once more for each rank, with "rank" first.
set -euo pipefail

if [ "$1" != rank ]; then
  ranks=${RANKS_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}
  # Caches on a disk of this node, of this job: neither other nodes nor other jobs wait for their locks.
  local=$LOCAL_SCRATCH/kantai-$SLURM_JOB_ID
  mkdir -p "$local"
  export TMPDIR=$local TORCHINDUCTOR_CACHE_DIR=$local/inductor TRITON_CACHE_DIR=$local/triton
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(($(nproc) / ranks > 0 ? $(nproc) / ranks : 1))}
  # A signal to the step reaches all its processes. The launcher would die of SIGUSR1 and take the ranks along, and pass SIGTERM on to ranks
  # that have got it already. Ignored here, it is ignored in the launcher; the ranks listen of their own accord.
  trap '' USR1 TERM
  export PET_SIGNALS_TO_HANDLE=SIGQUIT
  # same_network: without it the launchers that end first are reported as failed.
  exec accelerate launch --config_file "$1" --num_machines "$SLURM_NNODES" --num_processes $((SLURM_NNODES * ranks)) \
    --machine_rank "$SLURM_NODEID" --main_process_ip "$MASTER_ADDR" --main_process_port "$MASTER_PORT" --same_network \
    --rdzv_conf timeout=600 --no_python bash slurm/launch.sh rank "${@:2}"
fi

# The cores next to this rank's GPU; or its share of the node's.
shift
bus=$(nvidia-smi --query-gpu=pci.bus_id --format=csv,noheader --id="$LOCAL_RANK" 2>/dev/null | tr 'A-Z' 'a-z' | sed 's/^0000//') || bus=none
cores=$(cat "/sys/bus/pci/devices/$bus/local_cpulist" 2>/dev/null) || {
  allowed=($(taskset -cp $$ | sed 's/.*: //' | tr ',' '\n' | awk -F- '{for (i = $1; i <= ($2 ? $2 : $1); i++) print i}'))
  share=$((${#allowed[@]} / LOCAL_WORLD_SIZE))
  ((share > 0)) && cores=$(IFS=,; echo "${allowed[*]:LOCAL_RANK * share:share}") || cores=''
}
bind=(taskset -c "$cores")
"${bind[@]}" true 2>/dev/null || bind=()
log=$ATTEMPT_LOGS/rank-$(printf %05d "$RANK").log
code=0
PYTHONUNBUFFERED=1 ${bind[@]+"${bind[@]}"} python "$@" >"$log" 2>&1 || code=$?
# 75 is a stop in good order, 138 one where SIGUSR1 found Python on its way out already. The launchers would take either for a failure, and
# kill the other ranks while they close their files.
case $code in 75 | 138) exit 0 ;; *) exit "$code" ;; esac
