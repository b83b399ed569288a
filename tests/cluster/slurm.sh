#!/usr/bin/env bash
# A real Slurm of N nodes on one machine, for tests. Needs root and Debian's packages; no network leaves the machine.
#
#   slurm.sh STATE start [NODES=2] [GPUS=2]     SHARED="FOLDER ..." names folders of /tmp that the nodes share
#   slurm.sh STATE in ctl sbatch ...            a command on the login node; in n1 ...: on a node
#   slurm.sh STATE crash|boot|unplug|plug n2    a node loses its power, gets it back; its cable is pulled, put back
#   slurm.sh STATE stop
#
# A node is a slurmd in its own network, UTS, PID, IPC and mount namespace: own hostname, address, /tmp, /dev/shm. To end
# its first process is a crash; its cable is a veth on a bridge.
set -euo pipefail
# What is started here outlives the caller: it must not hold the caller's files (a lock's descriptor, say).
for fd in /proc/"$$"/fd/*; do fd=${fd##*/}; [ "$fd" -gt 2 ] && [ "$fd" != 255 ] && eval "exec $fd>&-"; done
self=$(realpath "$0") verb=$2
mkdir -p "$1" && STATE=$(realpath "$1")
shift 2
export SLURM_CONF=$STATE/slurm.conf

inside() {  # NAME COMMAND...
    local pid name=$1
    pid=$(cat "$STATE/ns/$name.pid") || exit 2
    shift
    # The login node shares the caller's PID namespace, so that signals reach what runs there.
    if [ "$name" = ctl ]; then set -- --wd="$PWD" -- "$@"; else set -- --pid --wd="$PWD" -- "$@"; fi
    ${only:-} nsenter --target "$pid" --net --uts --ipc --mount "$@"
}

boot() {  # NAME: the machine's namespaces, its cable and its slurmd
    local name=$1 holder pid_namespace=(--pid --fork --kill-child --mount-proc)
    [ "$name" = ctl ] && pid_namespace=()
    rm -f "$STATE/ns/$name."*
    setsid unshare --net --uts --ipc --mount "${pid_namespace[@]}" "$self" "$STATE" hold "$name" \
        </dev/null >"$STATE/log/hold-$name.log" 2>&1 &
    holder=$!
    echo "$holder" >> "$STATE/pids"
    for _ in $(seq 500); do [ -e "$STATE/ns/$name.ready" ] && break; sleep 0.02; done
    [ -e "$STATE/ns/$name.ready" ] || { cat "$STATE/log/hold-$name.log" >&2; exit 1; }
    if [ "$name" = ctl ]; then
        echo "$holder" > "$STATE/ns/ctl.pid"
        return
    fi
    pgrep -P "$holder" > "$STATE/ns/$name.pid"
    local cable=v${name#n}
    inside ctl ip link del "$cable" 2>/dev/null || true
    inside ctl ip link add "$cable" type veth peer name eth0 netns "$(cat "$STATE/ns/$name.pid")"
    inside ctl ip link set "$cable" master br0 up
    inside "$name" ip addr add "10.213.0.$((10 + ${name#n}))/24" dev eth0
    inside "$name" ip link set eth0 up
    inside "$name" slurmd -N "$name" >/dev/null
}

hold() {  # NAME: the first process of a machine
    hostname "$1"
    mount --make-rprivate /
    mount --bind "$STATE/hosts" /etc/hosts
    if [ "$1" != ctl ]; then
        local own=$STATE/ns/tmp-$1 path
        mkdir -p "$own" && mount -t tmpfs tmpfs "$own" && chmod 1777 "$own"
        for path in "$STATE" $SHARED; do
            case $path in /tmp/*) mkdir -p "$own/${path#/tmp/}" && mount --rbind "$path" "$own/${path#/tmp/}" ;; esac
        done
        mount --rbind "$own" /tmp
        mount -t tmpfs tmpfs /dev/shm
    fi
    ip link set lo up
    : > "$STATE/ns/$1.ready"
    if [ "$1" = ctl ]; then exec sleep infinity; fi
    while :; do sleep 1000 & wait $!; done
}

configure() {  # NODES GPUS
    local i g
    { echo "127.0.0.1 localhost"; echo "10.213.0.1 ctl"
      for i in $(seq "$1"); do echo "10.213.0.$((10 + i)) n$i"; done; } > "$STATE/hosts"
    for g in $(seq 0 $(($2 - 1))); do  # Slurm wants devices
        ln -sfn /dev/null "$STATE/dev/gpu$g"
        echo "Name=gpu File=$STATE/dev/gpu$g"
    done > "$STATE/gres.conf"
    echo CgroupPlugin=cgroup/v1 > "$STATE/cgroup.conf"  # nothing uses it, but 22.05 knows no "disabled"
    dd if=/dev/urandom of="$STATE/munge.key" bs=128 count=1 status=none
    chmod 600 "$STATE/munge.key"
    cat > "$SLURM_CONF" <<CONF
ClusterName=test
SlurmctldHost=ctl(10.213.0.1)
SlurmUser=root
AuthInfo=socket=$STATE/munge.socket
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc=$STATE/log/jobs.txt
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SchedulerParameters=bf_interval=1,sched_interval=1,batch_sched_delay=0,sched_min_interval=100000
GresTypes=gpu
SlurmdParameters=config_overrides
ReturnToService=2
SlurmdTimeout=${SLURMD_TIMEOUT:-10}
SlurmctldTimeout=10
KillWait=${KILL_WAIT:-5}
MinJobAge=600
RebootProgram=/bin/true
StateSaveLocation=$STATE/ctl
SlurmdSpoolDir=$STATE/spool-%n
SlurmctldPidFile=$STATE/ctl/slurmctld.pid
SlurmdPidFile=$STATE/slurmd-%n.pid
SlurmctldLogFile=$STATE/log/slurmctld.log
SlurmdLogFile=$STATE/log/slurmd-%n.log
NodeName=n[1-$1] CPUs=8 CoresPerSocket=8 RealMemory=64000 Gres=gpu:$2 State=UNKNOWN
PartitionName=main Nodes=n[1-$1] Default=YES MaxTime=4:00:00 DefaultTime=10:00 State=UP DefMemPerCPU=100
CONF
}

start() {  # NODES GPUS
    for command in slurmctld slurmd srun munged ip nsenter; do
        if ! command -v "$command" >/dev/null || [ "$(id -u)" != 0 ]; then
            echo "error: needs root and Slurm: apt-get install slurm-wlm munge iproute2 (no $command, or not root)" >&2
            exit 2
        fi
    done
    [ ! -e "$STATE/pids" ] || { echo "error: $STATE is running; slurm.sh $STATE stop" >&2; exit 2; }
    mkdir -p "$STATE"/{ctl,log,dev,ns}
    for i in $(seq "$1"); do mkdir -p "$STATE/spool-n$i"; done
    chmod 755 "$STATE"
    configure "$1" "$2"
    : > "$STATE/pids"
    boot ctl
    # An address of its own: a bridge takes its lowest cable's, and with that cable gone nobody would reach ctl for a while.
    inside ctl ip link add br0 address 02:00:00:00:00:01 type bridge
    inside ctl ip addr add 10.213.0.1/24 dev br0
    inside ctl ip link set br0 up
    inside ctl munged --force --key-file="$STATE/munge.key" --socket="$STATE/munge.socket" \
        --pid-file="$STATE/munged.pid" --log-file="$STATE/log/munged.log" --seed-file="$STATE/munged.seed" >/dev/null 2>&1
    inside ctl slurmctld -c >/dev/null
    for i in $(seq "$1"); do boot "n$i"; done
    for _ in $(seq 300); do
        [ "$(inside ctl sinfo -h -N -t idle -o %N 2>/dev/null | wc -l)" != "$1" ] || break
        sleep 0.1
    done
    inside ctl sinfo -N -o "%N %t %c %m %G"
}

stop() {  # by the ids that were written down; to end a holder ends its PID namespace
    [ -e "$STATE/pids" ] || { echo "nothing runs in $STATE"; exit 0; }
    kill "$(cat "$STATE/ctl/slurmctld.pid")" "$(cat "$STATE/munged.pid")" 2>/dev/null || true
    for file in "$STATE"/ns/*.pid; do kill -KILL "$(cat "$file")" 2>/dev/null || true; done
    while read -r pid; do
        for _ in $(seq 100); do kill -0 "$pid" 2>/dev/null || break; sleep 0.05; done
    done < "$STATE/pids"
    rm -rf "${STATE:?}"/{pids,ns,ctl,dev,shared} "$STATE"/spool-* "$STATE"/munge*
}

case $verb in
start) SHARED=${SHARED:-} && export SHARED && echo "$SHARED" > "$STATE/shared" && start "${1:-2}" "${2:-2}" ;;
stop) stop ;;
in) only="exec" && inside "$@" ;;
hold) hold "$1" ;;
boot) SHARED=$(cat "$STATE/shared") && export SHARED && boot "$1" ;;
crash) kill -KILL "$(cat "$STATE/ns/$1.pid")" ;;
unplug) inside ctl ip link set "v${1#n}" down ;;
plug) inside ctl ip link set "v${1#n}" up ;;
*) echo "error: $verb: start, stop, in, boot, crash, unplug or plug" >&2; exit 2 ;;
esac
