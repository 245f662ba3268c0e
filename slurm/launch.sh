#!/bin/bash
# srun starts this once on every node: bash slurm/launch.sh BACKEND PROGRAM ... It launches the
# ranks, and each rank starts this script again, with "rank" as first argument.
set -euo pipefail

if [ "$1" != rank ]; then
  ranks=${RANKS_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}
  # Caches go to this node's disk, into a folder of this job. So no job waits for the locks of
  # another node or job.
  local=$LOCAL_SCRATCH/kantai-$SLURM_JOB_ID
  # Another user can guess its name, and make it first.
  mkdir -p "$LOCAL_SCRATCH"
  is_own() { [ -d "$local" ] && [ ! -L "$local" ] && [ -O "$local" ]; }
  mkdir -m 700 "$local" 2>/dev/null || is_own ||
    { echo "error: $local is a link, or belongs to another user: set LOCAL_SCRATCH" >&2; exit 2; }
  chmod 700 "$local"
  export TMPDIR=$local TORCHINDUCTOR_CACHE_DIR=$local/inductor TRITON_CACHE_DIR=$local/triton
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(($(nproc) / ranks > 0 ? $(nproc) / ranks : 1))}
  # A signal to the step reaches all its processes. SIGUSR1 would kill the launcher and its ranks,
  # and the launcher would send SIGTERM to the ranks a second time. So the launcher ignores both,
  # as it inherits from here. The ranks install handlers of their own.
  trap '' USR1 TERM
  export PET_SIGNALS_TO_HANDLE=SIGQUIT
  # Without --same_network, the launchers that end first are reported as failed.
  exec accelerate launch --config_file "$1" \
    --num_machines "$SLURM_NNODES" --num_processes $((SLURM_NNODES * ranks)) \
    --machine_rank "$SLURM_NODEID" \
    --main_process_ip "$MASTER_ADDR" --main_process_port "$MASTER_PORT" --same_network \
    --rdzv_conf timeout=600 --no_python bash slurm/launch.sh rank "${@:2}"
fi

# Bind the rank to the cores next to its GPU, or else to its share of the node's cores.
shift
bus=$(nvidia-smi --query-gpu=pci.bus_id --format=csv,noheader --id="$LOCAL_RANK" 2>/dev/null |
  tr 'A-Z' 'a-z' | sed 's/^0000//') || bus=none
cores=$(cat "/sys/bus/pci/devices/$bus/local_cpulist" 2>/dev/null) || {
  allowed=($(taskset -cp $$ | sed 's/.*: //' | tr ',' '\n' |
    awk -F- '{for (i = $1; i <= ($2 ? $2 : $1); i++) print i}'))
  share=$((${#allowed[@]} / LOCAL_WORLD_SIZE))
  ((share > 0)) && cores=$(IFS=,; echo "${allowed[*]:LOCAL_RANK * share:share}") || cores=''
}
bind=(taskset -c "$cores")
"${bind[@]}" true 2>/dev/null || bind=()
log=$ATTEMPT_LOGS/rank-$(printf %05d "$RANK").log
code=0
PYTHONUNBUFFERED=1 ${bind[@]+"${bind[@]}"} python "$@" >"$log" 2>&1 || code=$?
# 75 is an orderly stop. 138 is an orderly stop that SIGUSR1 met while Python was exiting. The
# launchers would take either for a failure, and kill the other ranks while they close their files.
case $code in 75 | 138) exit 0 ;; *) exit "$code" ;; esac
