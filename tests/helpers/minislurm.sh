#!/usr/bin/env bash
# A real SLURM on one machine, for tests, on Debian or Ubuntu with slurm-wlm and munge:
#
#   minislurm.sh up DIR NODES                   a controller and nodes n1, n2, ...
#   minislurm.sh exec DIR COMMAND ...           run a client in it: sbatch, squeue, scancel, ...
#   minislurm.sh killnode|startnode DIR n2      kill the node and all its processes; start it again
#   minislurm.sh unplug|plug DIR n2             cut its network, not its processes; restore it
#   minislurm.sh onnode DIR n2 COMMAND ...      run a command there, such as a mount for it alone
#   minislurm.sh down DIR                       end everything
#
# Every node has its own process, mount and network namespace, with an address 10.77.0.1X and its
# own 127.0.0.1 and ports. On a shared loopback, launches would work that fail on a cluster.
# A bridge inside a private "holder" namespace joins the nodes. All processes end when the holder's
# first process is killed. The script writes nothing outside DIR. Without root, it adds a user
# namespace.
set -euo pipefail
command=$1; dir=$(realpath -m "$2"); shift 2; self=$(realpath "$0")
export SLURM_CONF=$dir/etc/slurm.conf
# Character devices stand for GPUs: SLURM counts and assigns them, and no program opens them.
simulated_gpus=(/dev/null /dev/zero /dev/full /dev/random /dev/urandom /dev/tty /dev/ptmx /dev/kmsg)
is_root() { [ "$(id -u)" = 0 ]; }

in_holder() {
  local user=()
  is_root || user=(-U --preserve-credentials)
  nsenter -t "$(cat "$dir/run/holder.pid")" "${user[@]}" -n -m -p --wd="$PWD" -- "$@"
}
# Without root, nsenter loses the holder's capabilities. Commands that need them go to the holder
# through a fifo.
ask() {
  local answer="$dir/run/answer.$$.$RANDOM"
  echo "$answer $*" >"$dir/run/requests"
  for _ in $(seq 18000); do # ends what hangs
    if [ -e "$answer" ]; then code=$(cat "$answer"); rm -f "$answer"; return "$code"; fi
    sleep 0.05
  done
  echo "minislurm: no answer to: $*" >&2; return 1
}
without_capabilities() {
  if is_root; then "$@"; else setpriv --ambient-caps=-all --inh-caps=-all "$@"; fi
}
wait_until_gone() { # zombies count as gone
  for _ in $(seq 100); do grep -qs '^State:.[^Z]' "/proc/$1/status" || return 0; sleep 0.05; done
}

start_node() { # in the holder
  local node=$1 number=${1#n} shell inside=
  mkdir -p "$dir/spool/$node"
  setsid nohup unshare --net --pid --mount-proc --uts --mount --fork --kill-child bash -c '
    hostname "$1"; mount --bind "$2/etc/hosts" /etc/hosts; ip link set lo up
    until ip link show eth0 >/dev/null 2>&1; do sleep 0.02; done
    ip addr add "10.77.0.$3/24" dev eth0; ip link set eth0 up
    drop=(); [ "$(id -u)" = 0 ] || drop=(setpriv --ambient-caps=-all --inh-caps=-all)
    "${drop[@]}" /usr/sbin/slurmd -D -N "$1" & wait $!' node "$node" "$dir" "$((10 + number))" \
    >>"$dir/log/node-$node.out" 2>&1 </dev/null &
  shell=$!
  echo $shell >"$dir/run/node-$node.pid"
  until inside=$(pgrep -P $shell); do sleep 0.02; done
  ip link del "v$node" 2>/dev/null || true
  until [ "$(readlink "/proc/$inside/ns/net")" != "$(readlink /proc/self/ns/net)" ]; do
    sleep 0.02
  done
  ip link add "v$node" type veth peer name eth0 netns "$inside"
  ip link set "v$node" master br0 up
}
on_node() { # in the holder
  local node=$1; shift
  nsenter -t "$(pgrep -P "$(cat "$dir/run/node-$node.pid")")" -n -m -p -u -- "$@"
}
start_controller() { # in the holder
  hostname ctl
  mount --bind "$dir/etc/hosts" /etc/hosts
  ip link set lo up
  ip link add br0 type bridge
  ip addr add 10.77.0.1/24 dev br0
  ip link set br0 up
  /usr/sbin/mungekey -c -k "$dir/etc/munge.key"
  # munged needs --force where DIR is in a folder that every user may write to.
  without_capabilities /usr/sbin/munged --force --num-threads=2 \
    --key-file="$dir/etc/munge.key" --socket="$dir/run/munge.sock" \
    --pid-file="$dir/run/munged.pid" --log-file="$dir/log/munged.log" \
    --seed-file="$dir/run/munged.seed" 2>>"$dir/log/munged.err"
  without_capabilities /usr/sbin/slurmctld -c
}
holder() { # process 1 of the holder namespace
  local nodes=$1 answer verb arguments code
  rm -f "$dir/run/requests"; mkfifo "$dir/run/requests"; exec 9<>"$dir/run/requests"
  start_controller
  for i in $(seq 1 "$nodes"); do start_node "n$i"; done
  for _ in $(seq 9000); do
    [ "$(sinfo -h -N -p main -o '%t' 2>/dev/null | grep -c '^idle$')" = "$nodes" ] && break
    sleep 0.1
  done
  : >"$dir/run/ready"
  while read -r answer verb arguments <&9; do
    code=0
    # shellcheck disable=SC2086 # the arguments are words
    case $verb in
      startnode) start_node "$arguments" ;;
      killnode) kill -9 "$(cat "$dir/run/node-$arguments.pid")" ;;
      unplug) ip link set "v$arguments" down ;;
      plug) ip link set "v$arguments" up ;;
      onnode) on_node $arguments ;;
    esac || code=$?
    echo "$code" >"$answer.partial"; mv "$answer.partial" "$answer"
  done
}

write_config() {
  local nodes=$1 user; user=$(id -un)
  mkdir -p "$dir"/{etc,run,log,state,spool}; chmod 755 "$dir" "$dir/run"
  : >"$dir/etc/plugstack.conf"; echo "CgroupPlugin=cgroup/v1" >"$dir/etc/cgroup.conf"
  printf 'AutoDetect=off\nName=gpu File=%s\n' \
    "$(IFS=,; echo "${simulated_gpus[*]:0:${MINISLURM_GPUS:-2}}")" >"$dir/etc/gres.conf"
  printf '127.0.0.1 localhost\n10.77.0.1 ctl\n' >"$dir/etc/hosts"
  cat >"$SLURM_CONF" <<C
ClusterName=mini
SlurmctldHost=ctl(10.77.0.1)
SlurmUser=$user
SlurmdUser=$user
AuthType=auth/munge
# Credentials hold this long, and a requeued job waits this long; the default is 120 seconds. A busy
# machine must deliver a message in this time.
AuthInfo=socket=$dir/run/munge.sock,cred_expire=$((nodes > 8 ? 30 : 10))
MessageTimeout=60
CredType=cred/munge
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool/%n
SlurmctldPidFile=$dir/run/slurmctld.pid
SlurmdPidFile=$dir/run/slurmd-%n.pid
SlurmctldLogFile=$dir/log/slurmctld.log
SlurmdLogFile=$dir/log/slurmd-%n.log
PlugStackConfig=$dir/etc/plugstack.conf
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=bf_interval=1,sched_interval=1,sched_min_interval=100000
# Nodes may have more cores than the machine.
SlurmdParameters=config_overrides
ReturnToService=2
# Nodes that only are slow are not lost; tests say so themselves when one is.
SlurmdTimeout=120
KillWait=5
# Minutes that a job may go on after its limit: a busy machine needs one to save after the signal.
OverTimeLimit=3
MinJobAge=600
JobRequeue=1
PropagateResourceLimits=NONE
GresTypes=gpu
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=DEFAULT CPUs=2 Boards=1 SocketsPerBoard=1 CoresPerSocket=2 ThreadsPerCore=1
NodeName=DEFAULT RealMemory=8000 Gres=gpu:${MINISLURM_GPUS:-2} State=UNKNOWN
C
  for i in $(seq 1 "$nodes"); do
    echo "NodeName=n$i NodeHostname=n$i NodeAddr=10.77.0.$((10 + i))" >>"$SLURM_CONF"
    echo "10.77.0.$((10 + i)) n$i" >>"$dir/etc/hosts"
  done
  echo "PartitionName=main Nodes=n[1-$nodes] Default=YES MaxTime=INFINITE State=UP GraceTime=60" \
    >>"$SLURM_CONF"
  # Jobs of this partition preempt those of main.
  echo "PartitionName=urgent Nodes=n[1-$nodes] MaxTime=INFINITE State=UP PriorityTier=10" \
    >>"$SLURM_CONF"
}
up() {
  local user=() parent child=
  write_config "$1"
  is_root || user=(--user --map-current-user --keep-caps)
  rm -f "$dir/run/ready"
  setsid nohup unshare "${user[@]}" --net --pid --mount-proc --uts --mount --fork --kill-child \
    bash "$self" holder "$dir" "$1" >"$dir/log/holder.out" 2>&1 </dev/null &
  parent=$!
  echo $parent >"$dir/run/holder-parent.pid"
  until child=$(pgrep -P $parent); do kill -0 $parent 2>/dev/null || break; sleep 0.02; done
  echo "$child" >"$dir/run/holder.pid"
  for _ in $(seq 19000); do
    [ -e "$dir/run/ready" ] && break
    kill -0 $parent 2>/dev/null || break
    sleep 0.05
  done
  [ -e "$dir/run/ready" ] || {
    tail -n 5 "$dir"/log/*.out "$dir"/log/slurmctld.log >&2
    down
    return 1
  }
}
down() {
  local parent; parent=$(cat "$dir/run/holder-parent.pid")
  kill -9 "$parent" 2>/dev/null || true
  wait_until_gone "$parent"; wait_until_gone "$(cat "$dir/run/holder.pid")"
}

case $command in
  up) up "${1:-2}" ;;
  down) down ;;
  exec) in_holder "$@" ;;
  holder) holder "$1" ;;
  killnode | startnode | unplug | plug | onnode) ask "$command" "$@" ;;
esac
