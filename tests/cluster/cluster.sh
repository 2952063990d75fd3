#!/usr/bin/env bash
# A real SLURM cluster on this machine, started by hand: NAME-ctl and nodes NAME-1 .. NAME-N, where NAME is DIR's.
#
#   cluster.sh namespaces DIR N up | down      each node has network, host name, mounts, processes and IPC of its own
#   cluster.sh one-host DIR N up | down        where namespaces are refused: several slurmd beside each other
#   ... run COMMAND ARGUMENTS...               as a user at the controller
#   ... off NODE, on NODE                      power (namespaces only)
#
# DIR, short and readable for all, gets all state. Nodes big1 .. big16 are in the configuration only: `sbatch
# --test-only` reckons with them (--partition=big).
set -euo pipefail

layout=$1 dir=$2 nodes=$3 action=$4
shift 4
name=${dir##*/} # in those of namespaces, hosts and control groups, which the whole machine shares
net=10.77.0 # of a bridge that is the cluster's own
gpus=8 cpus=64
export SLURM_CONF=$dir/slurm.conf

configure() {
    mkdir -p "$dir"/{spool,ctl,log,munge,dev,tmp}
    chmod 711 "$dir/munge"
    head -c 1024 /dev/urandom >"$dir/munge/key"
    chmod 600 "$dir/munge/key"
    local number
    for number in $(seq 0 $((gpus - 1))); do
        # With a character device SLURM sets CUDA_VISIBLE_DEVICES; without GPUs torch does not look at it.
        mknod "$dir/dev/nvidia$number" c 195 "$number" 2>/dev/null || : >"$dir/dev/nvidia$number"
    done
    echo "Name=gpu File=$dir/dev/nvidia[0-$((gpus - 1))]" >"$dir/gres.conf"
    local tracking=linuxproc
    if [[ $layout = namespaces && -w /sys/fs/cgroup/freezer ]] && grep -q ' /sys/fs/cgroup/freezer cgroup ' /proc/mounts; then
        tracking=cgroup
        printf 'CgroupPlugin=cgroup/v1\nCgroupMountpoint=/sys/fs/cgroup\nCgroupAutomount=no\n' >"$dir/cgroup.conf"
    fi
    local where="NodeAddr=$net.[1-$nodes]" controller="$name-ctl($net.254)" hosts="$net.254 $name-ctl"
    for number in $(seq 1 "$nodes"); do hosts+=$'\n'"$net.$number $name-$number"; done
    if [[ $layout = one-host ]]; then
        local base=$((20000 + $$ % 20000))
        where="NodeHostname=$(hostname -s) NodeAddr=127.0.0.1 Port=[$((base + 1))-$((base + nodes))]"
        controller="$(hostname -s)(127.0.0.1)"$'\n'"SlurmctldPort=$base"
        hosts=$(sed -E 's/^[^ ]+/127.0.0.1/' <<<"$hosts")
    fi
    printf '127.0.0.1 localhost %s\n%s\n' "$(hostname -s)" "$hosts" >"$dir/hosts"
    local shape="CPUs=$cpus Sockets=1 CoresPerSocket=$cpus ThreadsPerCore=1 RealMemory=8000 Gres=gpu:$gpus"
    cat >"$dir/slurm.conf" <<END
ClusterName=test
SlurmctldHost=$controller
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$dir/munge/sock,cred_expire=5
CredType=cred/munge
StateSaveLocation=$dir/ctl
SlurmctldPidFile=$dir/ctl.pid
SlurmctldLogFile=$dir/log/slurmctld.log
SlurmdSpoolDir=$dir/spool/%n
SlurmdPidFile=$dir/slurmd-%n.pid
SlurmdLogFile=$dir/log/slurmd-%n.log
ProctrackType=proctrack/$tracking
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_min_interval=0,batch_sched_delay=0,requeue_delay=1
SlurmdParameters=config_overrides
MpiDefault=none
ReturnToService=2
SlurmctldTimeout=10
SlurmdTimeout=10
KillWait=5
MinJobAge=3600
InactiveLimit=0
JobRequeue=1
MailProg=/bin/true
SwitchType=switch/none
TmpFS=$dir/tmp/%n
GresTypes=gpu
SuspendProgram=/bin/true
ResumeProgram=/bin/true
SuspendTime=INFINITE
NodeName=$name-[1-$nodes] $where $shape State=UNKNOWN
NodeName=big[1-16] $shape State=CLOUD
PartitionName=train Nodes=$name-[1-$nodes] Default=YES MaxTime=INFINITE State=UP
PartitionName=big Nodes=big[1-16] MaxTime=INFINITE State=UP
END
}

# A network namespace with an address on the cluster's own bridge.
plug_in() { # host, last number of its address
    ip netns add "$1"
    ip -n "$1" link set lo up
    ip link add "v-$2" netns "$name-net" type veth peer name eth0 netns "$1"
    ip -n "$name-net" link set "v-$2" master br0 up
    ip -n "$1" addr add "$net.$2/24" dev eth0
    ip -n "$1" link set eth0 up
}

# shellcheck disable=SC2016 # expanded by the shells that are started
on() {
    mkdir -p "$dir/spool/$1" "$dir/tmp/$1"
    if [[ $layout = one-host ]]; then
        with_hosts slurmd -N "$1" -f "$dir/slurm.conf"
        return
    fi
    # bash is process 1 of the node and reaps orphans; --kill-child takes all its processes with it.
    nsenter --net="/run/netns/$1" unshare --uts --mount --ipc --pid --fork --kill-child --mount-proc \
        --propagation private bash -c '
            hostname "$1"; mount --bind "$2/hosts" /etc/hosts; mount -t tmpfs -o size=1g tmpfs /dev/shm
            slurmd -D -f "$2/slurm.conf" &
            trap "kill $!; exit 0" TERM; while :; do wait; sleep 0.2; done' _ "$1" "$dir" \
        >"$dir/log/boot-$1.log" 2>&1 </dev/null &
    echo $! >"$dir/host-$1.pid"
}

off() { kill -9 "$(cat "$dir/host-$1.pid")"; }

# shellcheck disable=SC2016
with_hosts() { unshare --mount --propagation private bash -c 'mount --bind "$1/hosts" /etc/hosts; shift; exec "$@"' _ "$dir" "$@"; }

# shellcheck disable=SC2016
run() {
    if [[ $layout = one-host ]]; then
        with_hosts "$@"
        return
    fi
    nsenter --net="/run/netns/$name-ctl" unshare --uts --mount --propagation private \
        bash -c 'hostname "$1"; mount --bind "$2/hosts" /etc/hosts; shift 2; exec "$@"' _ "$name-ctl" "$dir" "$@"
}

up() {
    configure
    if [[ $layout = namespaces ]]; then
        ip netns add "$name-net"
        ip -n "$name-net" link set lo up
        ip -n "$name-net" link add br0 type bridge
        ip -n "$name-net" link set br0 up
        plug_in "$name-ctl" 254
    fi
    munged --force --key-file="$dir/munge/key" --socket="$dir/munge/sock" --pid-file="$dir/munge/pid" \
        --log-file="$dir/munge/log" --seed-file="$dir/munge/seed"
    run slurmctld -c -f "$dir/slurm.conf"
    local number
    for number in $(seq 1 "$nodes"); do
        [[ $layout = one-host ]] || plug_in "$name-$number" "$number"
        on "$name-$number"
    done
    for _ in $(seq 1 100); do
        [[ $(run sinfo --noheader --partition=train --states=idle --format=%D 2>/dev/null || true) != "$nodes" ]] || return 0
        sleep 0.1
    done
    run sinfo --Node --long >&2
    return 1
}

down() {
    local file number left
    for file in "$dir"/host-*.pid; do
        [[ ! -s $file ]] || kill -9 "$(cat "$file")" 2>/dev/null || true
    done
    for file in "$dir"/slurmd-*.pid "$dir/ctl.pid" "$dir/munge/pid"; do
        [[ ! -s $file || ($file = */slurmd-* && $layout = namespaces) ]] || kill "$(cat "$file")" 2>/dev/null || true
    done
    sleep 1
    for left in net ctl $(seq 1 "$nodes"); do
        ip netns del "$name-$left" 2>/dev/null || true
    done
    for number in $(seq 1 "$nodes"); do
        find "/sys/fs/cgroup/freezer/slurm_$name-$number" -depth -type d -exec rmdir {} \; 2>/dev/null || true
    done
}

"$action" "$@"
