#!/usr/bin/env bash
# Train under the mpirun of Open MPI, MPICH or Intel MPI, one process a GPU:
#
#   launch/mpi_pretrain.sh recipes/pretrain_7b.yaml --backend fsdp --optimizer.learning_rate 1e-5
#
# It begins with a preflight, goes on from the run's newest checkpoint, and starts again after a failure. SIGTERM,
# SIGUSR1 and SIGINT to this script ask the run for a checkpoint, whatever the MPI does with signals; it then ends
# with status 75. From the environment, all optional:
#
#   PMC_MPIEXEC       mpiexec of the MPI              (the one on PATH)
#   PMC_MPI_OPTIONS   more options of mpiexec, by spaces
#   PMC_RANKS         processes, over all nodes       (one a GPU of this machine)
#   PMC_PER_NODE      processes a node                (the MPI's choice)
#   PMC_HOSTFILE      file that names the nodes       (the scheduler's nodes, or this machine)
#   PMC_VENV          virtual environment             (.venv of the repository, else pmc-llama as found on PATH)
#   PMC_INTERFACE     network interface of NCCL and gloo            (their choice)
#   PMC_NODE_TMP      directory on each node's own disk, for caches (/tmp)
#   PMC_PREFLIGHT     0 leaves the preflight out                    (1)
#   PMC_MAX_RESTARTS  restarts in a row that bring no new checkpoint, after which it gives up (3)
#   PMC_REQUEUE       1 starts again when the run itself was asked to stop, by OUTPUT/stop or a signal to a rank (0)
set -euo pipefail

repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

say() { echo "launch: $*" >&2; }

refuse() {
    say "error: $*"
    exit 2
}

[[ $# -gt 0 && $1 != -* ]] || refuse "usage: $0 RECIPE [--section.key VALUE ...]"

# --- with what -----------------------------------------------------------------------------------------------

program=${PMC_VENV:-$repository/.venv}/bin/pmc-llama
if [[ ! -x $program ]]; then
    [[ -z ${PMC_VENV:-} ]] || refuse "PMC_VENV is $PMC_VENV, which has no bin/pmc-llama"
    program=$(command -v pmc-llama) || refuse "$program is not there; run make, or set PMC_VENV"
fi
mpiexec=$(command -v "${PMC_MPIEXEC:-mpiexec}") ||
    refuse "there is no ${PMC_MPIEXEC:-mpiexec}; load the module of an MPI, or set PMC_MPIEXEC"
case $("$mpiexec" --version 2>&1 || true) in
    *"Open MPI"*) mpi="Open MPI" ;;
    *"Intel(R) MPI"*) mpi="Intel MPI" ;;
    *HYDRA*) mpi="MPICH" ;;
    *) refuse "$mpiexec is neither Open MPI's nor MPICH's nor Intel MPI's; set PMC_MPIEXEC" ;;
esac

# mpi4py takes the library of another MPI first where one is installed beside Python.
if [[ -z ${MPI4PY_LIBMPI:-} ]]; then
    prefix=$(dirname "$(dirname "$(readlink -f "$mpiexec")")")
    for directory in "$prefix"/lib{,64,/release}; do
        if compgen -G "$directory/libmpi.so*" >/dev/null; then
            export MPI4PY_LIBMPI=$directory
            break
        fi
    done
fi

gpus=$(nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU' || true)
ranks=${PMC_RANKS:-$gpus}
[[ $ranks -ge 1 ]] || refuse "no GPU is seen on this machine; set PMC_RANKS"
here=${PMC_PER_NODE:-$((gpus > 0 && gpus < ranks ? gpus : ranks))} # ranks on a machine
threads=$(($(nproc --all) / here))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}
if [[ -n ${PMC_INTERFACE:-} ]]; then
    export NCCL_SOCKET_IFNAME=$PMC_INTERFACE GLOO_SOCKET_IFNAME=$PMC_INTERFACE
fi
caches=${PMC_NODE_TMP:-/tmp}/pmc-llama-$(id -u)
export TRITON_CACHE_DIR=$caches/triton TORCHINDUCTOR_CACHE_DIR=$caches/inductor
# Its own: a build that is killed leaves a lock for which the next one would wait for ever.
export TORCH_EXTENSIONS_DIR=$caches/extensions-$$

# Open MPI shows ranks a terminal even where there is none.
[[ -t 1 ]] || export TERM=dumb

launch=("$mpiexec" -n "$ranks")
if [[ $mpi = "Open MPI" ]]; then
    launch+=(--bind-to none) # else all threads of a rank share one core
    [[ -z ${PMC_PER_NODE:-} ]] || launch+=(--map-by "ppr:$PMC_PER_NODE:node")
    [[ -z ${PMC_HOSTFILE:-} ]] || launch+=(--hostfile "$PMC_HOSTFILE")
    # The others hand on the whole environment, Open MPI to other nodes none of it.
    while read -r name; do
        [[ $name =~ ^(NCCL|GLOO|OMP|MKL|TORCH|TORCHINDUCTOR|PYTORCH|CUDA|TRITON|DS|HF|WANDB|MASTER|MPI4PY)_ || $name =~ ^TERM$|PATH$ ]] || continue
        launch+=(-x "$name")
    done < <(compgen -e)
else
    [[ -z ${PMC_PER_NODE:-} ]] || launch+=(-ppn "$PMC_PER_NODE")
    [[ -z ${PMC_HOSTFILE:-} ]] || launch+=(-f "$PMC_HOSTFILE")
fi
read -ra more <<<"${PMC_MPI_OPTIONS:-}"
launch+=("${more[@]}" "$program")

# --- the run -------------------------------------------------------------------------------------------------

# Also tells mistakes in the recipe before anything else is started.
resolved=$("$program" train "$@" --print_config) || exit
output=$("$(dirname "$program")/python" -c 'import sys, yaml; print(yaml.safe_load(sys.stdin)["output"])' <<<"$resolved")
say "$ranks ranks by $mpi's $mpiexec; output $output"
rm -f "$output/stop" # asked of a start before

asked=""
# shellcheck disable=SC2329 # the traps call it
ask_to_stop() { # the name of the signal
    say "$1: asking the run for a checkpoint"
    asked=$1
    mkdir -p "$output"
    : >"$output/stop"
}
trap 'ask_to_stop SIGTERM' TERM
trap 'ask_to_stop SIGUSR1' USR1
trap 'ask_to_stop SIGINT' INT

# The status of a command, which runs on when a signal comes. It has a process group of its own: mpiexec ends a run
# at once on the SIGINT of a terminal, and Open MPI's on SIGTERM, too.
status_of() {
    local status=0 process
    set -m
    "$@" &
    process=$!
    set +m
    while kill -0 "$process" 2>/dev/null; do
        wait "$process" || true
    done
    wait "$process" || status=$?
    return "$status"
}

newest_step() {
    local found=("$output"/checkpoints/step-*)
    local number=${found[-1]##*/step-}
    [[ $number =~ ^[0-9]+$ ]] || number=0
    echo $((10#$number))
}

fruitless=0 status=0
while :; do
    before=$(newest_step)
    if [[ ${PMC_PREFLIGHT:-1} != 0 ]]; then
        status_of "${launch[@]}" preflight "$@" || refuse "the preflight failed"
    fi
    status=0
    status_of "${launch[@]}" train "$@" --resume || status=$?
    case $status in
        # What a user can mend. 3 is 2 on one rank and 1 on another, as MPICH and Intel MPI put them together.
        0 | 2 | 3) break ;;
        75) [[ -z $asked && ${PMC_REQUEUE:-0} = 1 ]] || break ;;
    esac
    [[ -z $asked ]] || break
    if [[ $(newest_step) -gt $before ]]; then
        fruitless=0
    fi
    fruitless=$((fruitless + 1))
    if [[ $fruitless -gt ${PMC_MAX_RESTARTS:-3} ]]; then
        say "error: status $status, and no new checkpoint since $fruitless starts (PMC_MAX_RESTARTS=${PMC_MAX_RESTARTS:-3})"
        break
    fi
    say "status $status; starting again (failure $fruitless without a new checkpoint, ${PMC_MAX_RESTARTS:-3} are borne)"
done
exit "$status"
