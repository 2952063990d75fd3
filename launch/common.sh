# shellcheck shell=bash
# The life of a job, sourced by the SLURM scripts beside this file, which hold resources and a recipe only.
#
# From the environment, all optional (sbatch hands it on; partition, account, QOS and time limit are sbatch's own
# SBATCH_PARTITION, SBATCH_ACCOUNT, SBATCH_QOS, SBATCH_TIMELIMIT):
#
#   PMC_RECIPE        recipe file in place of the script's
#   PMC_VENV          virtual environment          (.venv of the repository, else pmc-llama as found on PATH)
#   PMC_CONTAINER     image that has pmc-llama in place of an environment: *.sif under apptainer, all else under
#                     enroot/pyxis
#   PMC_MOUNTS        more directories for the container, with commas; the repository and the working directory
#                     are mounted in any case
#   PMC_INTERFACE     network interface of NCCL and gloo            (their choice)
#   PMC_NODE_TMP      directory on each node's own disk, for caches (/tmp)
#   PMC_PREFLIGHT     0 leaves the preflight out                    (1)
#   PMC_MAX_RESTARTS  restarts in a row that bring no new checkpoint, after which the job gives up (3)
set -euo pipefail

repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

say() { echo "launch: $*" >&2; }

refuse() {
    say "error: $*"
    exit 2
}

[[ -n ${SLURM_JOB_ID:-} ]] || refuse "this is a job: start it with sbatch"

attempt=${SLURM_RESTART_COUNT:-0}

# In a job array %a stands for the number of the task: --seed %a --output runs/seed-%a
task=${SLURM_ARRAY_TASK_ID:-%a}
set -- "${@//%a/$task}" # a sourced script's arguments are those of the script that sources it
PMC_BASE=${PMC_BASE:-} PMC_MODEL=${PMC_MODEL:-}
PMC_BASE=${PMC_BASE//%a/$task} PMC_MODEL=${PMC_MODEL//%a/$task}

# --- where and with what -----------------------------------------------------------------------------------------

# Fills `step`, options that every srun needs, and `container`, what stands before a command.
set_up() {
    # Given again: since 22.05 srun does not take the cores from sbatch; --export=NONE of sbatch would hold here, too.
    step=(--mpi=none --export=ALL "--cpus-per-task=${SLURM_CPUS_PER_TASK:-1}")
    container=()
    if [[ ${PMC_CONTAINER:-} = *.sif ]]; then
        container=(apptainer exec --nv --bind "$repository,$PWD${PMC_MOUNTS:+,$PMC_MOUNTS}" --pwd "$PWD" "$PMC_CONTAINER")
    elif [[ -n ${PMC_CONTAINER:-} ]]; then
        local directory mounts="$repository:$repository,$PWD:$PWD"
        for directory in ${PMC_MOUNTS//,/ }; do
            mounts+=",$directory:$directory"
        done
        step+=("--container-image=$PMC_CONTAINER" "--container-mounts=$mounts" "--container-workdir=$PWD")
    else
        use_environment
    fi

    local hosts
    hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
    export MASTER_ADDR=${hosts%%$'\n'*}
    export MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000)) # below the ports that Linux hands out itself
    if [[ -n ${PMC_INTERFACE:-} ]]; then
        export NCCL_SOCKET_IFNAME=$PMC_INTERFACE GLOO_SOCKET_IFNAME=$PMC_INTERFACE
    fi
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}

    local caches
    caches=${PMC_NODE_TMP:-/tmp}/pmc-llama-$(id -u)
    export TRITON_CACHE_DIR=$caches/triton TORCHINDUCTOR_CACHE_DIR=$caches/inductor
    # An attempt's own: a build that is killed leaves a lock for which the next one would wait for ever.
    export TORCH_EXTENSIONS_DIR=$caches/extensions-$SLURM_JOB_ID-$attempt
}

use_environment() {
    local environment=${PMC_VENV:-$repository/.venv}
    if [[ -x $environment/bin/pmc-llama ]]; then
        export VIRTUAL_ENV=$environment PATH=$environment/bin:$PATH
        return
    fi
    [[ -z ${PMC_VENV:-} ]] || refuse "PMC_VENV is $PMC_VENV, which has no bin/pmc-llama"
    command -v pmc-llama >/dev/null ||
        refuse "$environment has no bin/pmc-llama; run make there, or set PMC_VENV or PMC_CONTAINER"
}

# A command on one process of the job.
alone() { srun "${step[@]}" --nodes=1 --ntasks=1 --ntasks-per-node=1 "${container[@]}" "$@"; }

# Resources of the job as SLURM has them now, a field of `scontrol show job`.
job_field() { scontrol show job "$SLURM_JOB_ID" | sed -n "s/.*\b$1=\([^ ]*\).*/\1/p" | head -n 1; }

# --- what is kept of a job ---------------------------------------------------------------------------------------

# run.json, which the trainer writes, has command, commit, versions and hosts of each start. Kept here is what
# only the job knows.
keep_records() { # the arguments of pmc-llama train
    cp "$0" "$records/job.sh"
    cp "$1" "$records/recipe.yaml"
    printf '%s\n' "$resolved" >"$records/resolved.yaml"
    printf '%q ' pmc-llama train "$@" --resume >"$records/command"
    scontrol show job "$SLURM_JOB_ID" >"$log/job.txt"
    environment_without_secrets >"$log/environment.txt"
    local commit
    if commit=$(git -C "$repository" rev-parse HEAD 2>/dev/null); then
        echo "$commit" >"$records/git-commit"
        git -C "$repository" diff HEAD >"$records/git-changes.patch"
    fi
}

environment_without_secrets() {
    local name
    while read -r name; do
        [[ $name =~ ^(SLURM|SBATCH|PMC|NCCL|GLOO|UCX|FI|OMP|MKL|KMP|CUDA|ROCR|TORCH|TORCHINDUCTOR|PYTORCH|TRITON|DS|HF|WANDB|MASTER)_|^(PATH|LD_LIBRARY_PATH|PYTHONPATH|VIRTUAL_ENV|LOADEDMODULES|CONDA_PREFIX)$ ]] || continue
        [[ ! ${name^^} =~ KEY|TOKEN|SECRET|PASSW|CREDENTIAL|AUTH|COOKIE|JWT ]] || continue
        [[ ! ${!name} =~ ://[^/@]*@ ]] || continue
        printf '%s=%q\n' "$name" "${!name}"
    done < <(compgen -e)
}

# --- attempts ----------------------------------------------------------------------------------------------------

# A line at the start of each attempt of the job and one at its end, in `$records/attempts`:
#   TIME start STEP NODES
#   TIME end   STEP STATUS NODE      NODE failed first, or `-`; STATUS is `asked` of a run that was asked to stop,
#                                    `timeout` of one that did not do so in time
# STEP is that of the newest checkpoint.
note() { echo "$(date +%FT%T) $1 $(newest_step) ${*:2}" >>"$records/attempts"; }

newest_step() {
    local found=("$output"/checkpoints/step-*)
    local number=${found[-1]##*/step-}
    [[ $number =~ ^[0-9]+$ ]] || number=0
    echo $((10#$number))
}

# Attempts since the newest checkpoint that neither brought another nor were asked to stop. One without an end
# was killed with its node.
fruitless() {
    awk '
        function reached(step) { if (step > best) { best = step; failed = 0 } }
        BEGIN { best = -1 }
        $2 == "start" { failed += open; reached($3); open = 1 }
        $2 == "end" && open { open = 0; if ($4 != "asked") failed++; reached($3) }
        END { print failed + open }
    ' "$records/attempts"
}

# The node on which the last two attempts failed first, if it is one.
bad_node() {
    awk '
        $2 == "end" { bad = $5 == last && $5 != "-" ? $5 : ""; last = $5 }
        END { print bad }
    ' "$records/attempts"
}

# The first line in which srun tells of a rank that ended badly. (Those that follow it are peers that lost it, or
# that srun ended.)
first_failure() { grep -m 1 -E '^srun: error: [^ :]+: tasks? [^ ]+: ' "$log/srun.log" || true; }

# A node of which srun has not heard the end, when it has been ended waiting.
silent_node() {
    local node
    while read -r node; do
        grep -q "^srun: error: $node: task" "$log/srun.log" || { echo "$node"; return; }
    done < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
}

# The node to blame: one that the preflight names, that of the rank which a hang report calls late, one that was lost or
# silent, else the node of the first rank that failed.
failed_node() {
    local node
    node=$(unfit_nodes | sed -n 1p)
    if [[ $output/logs/hang.txt -nt $log/job.txt ]]; then
        node=$(sed -n 's/.*rank [0-9]* on \([^ ]*\) is late.*/\1/p' "$output/logs/hang.txt" | head -n 1)
    fi
    [[ -n $node ]] || node=$(sed -n 's/.*error: Node failure on \([^ ]*\)$/\1/p' "$log/srun.log" | head -n 1)
    [[ -n $node || ! -e $log/silent ]] || node=$(silent_node)
    [[ -n $node ]] || node=$(first_failure | sed -n 's/^srun: error: \([^ :]*\): .*/\1/p')
    echo "${node:--}"
}

# --- asking, ending, starting again --------------------------------------------------------------------------------

# shellcheck disable=SC2329 # the traps call it
ask_to_stop() { # the name of the signal
    asked=$1
    [[ -n ${output:-} ]] || return 0 # passed on once it is known whom to ask
    say "$1: asking the run for a checkpoint"
    : >"$output/stop"
    [[ $1 = SIGTERM ]] || return 0
    # SLURM ends the job: this may be the last that is done.
    if [[ $(job_field Reason) = TimeLimit ]]; then
        note end timeout - # the time before the limit did not suffice
        requeue
    fi
    note end asked -
}

# From here on; a signal that comes early is remembered.
listen() {
    asked=${asked:-}
    trap 'ask_to_stop SIGUSR1' USR1
    trap 'ask_to_stop SIGTERM' TERM
}

# Wait for a process, also when traps interrupt the waiting; its status.
status_of() {
    local status=0
    while kill -0 "$1" 2>/dev/null; do
        wait "$1" || true
    done
    wait "$1" || status=$?
    return "$status"
}

requeue() { # the exit status of this attempt
    local node excluded
    node=$(bad_node)
    trap '' TERM # which requeueing sends
    if ! scontrol requeue "$SLURM_JOB_ID"; then
        say "the job cannot be requeued; start it again: the run goes on from its newest checkpoint"
        exit "${1:-75}"
    fi
    # Not possible before, while the job is running.
    if [[ -n $node ]]; then
        excluded=$(job_field ExcNodeList)
        [[ $excluded != "(null)" ]] || excluded=""
        excluded=${excluded:+$excluded,}$node
        if enough_nodes_without "$excluded" && scontrol update "JobId=$SLURM_JOB_ID" "ExcNodeList=$excluded"; then
            say "$node failed twice in a row: excluded from here on"
        fi
    fi
    exit "${1:-75}"
}

enough_nodes_without() { # a list of nodes
    local others
    others=$(sinfo --noheader --Node --partition="$SLURM_JOB_PARTITION" --states=idle,allocated,mixed,completing \
        --format=%N | sort -u | grep -cvxF "$(scontrol show hostnames "$1")" || true)
    [[ $others -ge $SLURM_JOB_NUM_NODES ]]
}

# Decide what becomes of the job after an attempt.
end_attempt() { # its exit status
    local status=$1 node=-
    if [[ $status -eq 2 ]] && some_nodes_unfit; then
        status=1
    fi
    case $status in
        0) note end 0 -; exit 0 ;;
        2) note end 2 -; last_words; exit 2 ;; # what a user can mend: the same again would fail again
    esac
    if [[ $(job_field JobState) != RUNNING ]]; then # cancelled, or preempted and requeued by SLURM itself
        [[ $asked = SIGTERM ]] || note end asked -
        exit "$status"
    fi
    if [[ $status -eq 75 ]]; then
        note end asked -
        say "stopped with a checkpoint; requeued"
        requeue
    fi
    node=$(failed_node)
    note end "$status" "$node"
    last_words
    local failures most=${PMC_MAX_RESTARTS:-3}
    failures=$(fruitless)
    if [[ $failures -gt $most ]]; then
        give_up "$failures" "$status"
    fi
    say "status $status, first on $node; requeued (failure $failures without a new checkpoint, $most are borne)"
    requeue "$status"
}

give_up() { # failures, the exit status
    say "error: $1 attempts in a row brought no new checkpoint (PMC_MAX_RESTARTS=${PMC_MAX_RESTARTS:-3}); see $records"
    exit "$2"
}

# Rank 0 speaks in the job's output; what others said before they had a log of their own is shown here.
last_words() {
    cat "$log/srun.log" >&2
    local file
    while read -r file; do
        say "last words of $file:"
        tail -n 15 "$file" >&2
    done < <(find "$log" -name '*-rank-*.log' ! -name '*-rank-00000.log' -size +0 | sort | head -n 8)
}

# --- the life of a job ---------------------------------------------------------------------------------------------

# Train as a recipe says, on all processes of the job, and see to it that the job goes on until the run is finished.
train_as_job() { # RECIPE [--section.key VALUE ...]
    local status=0
    listen
    set_up
    set -- "${PMC_RECIPE:-$1}" "${@:2}"
    [[ -f $1 ]] || refuse "there is no recipe $1"
    # Also tells mistakes in the recipe before anything else is started.
    resolved=$(alone pmc-llama train "$@" --print_config) || exit
    local directory
    directory=$(alone python -c 'import sys, yaml; print(yaml.safe_load(sys.stdin)["output"])' <<<"$resolved")
    records=$directory/slurm/$SLURM_JOB_ID log=$directory/slurm/$SLURM_JOB_ID/attempt-$attempt
    mkdir -p "$log"
    output=$directory
    keep_records "$@"
    say "job $SLURM_JOB_ID, attempt $attempt, on $SLURM_JOB_NODELIST; records and logs of ranks in $log"
    touch "$records/attempts"
    local failures
    failures=$(fruitless)
    [[ $failures -le ${PMC_MAX_RESTARTS:-3} ]] || give_up "$failures" 1
    note start "$SLURM_JOB_NODELIST"
    rm -f "$output/stop" # asked of the attempt before
    [[ -z $asked ]] || ask_to_stop "$asked"
    preflight "$@" --resume || status=$?
    [[ $status -ne 0 ]] || run_ranks pmc-llama train "$@" --resume || status=$?
    end_attempt "$status"
}

# Look whether every node is fit.
preflight() { # the arguments of pmc-llama train
    local process status=0
    [[ ${PMC_PREFLIGHT:-1} != 0 ]] || return 0
    # It ends by itself, and each node shall have its say.
    srun "${step[@]}" --kill-on-bad-exit=0 "--output=$log/preflight.log" "${container[@]}" pmc-llama preflight "$@" 2>"$log/srun.log" &
    process=$!
    status_of "$process" || status=$?
    cat "$log/preflight.log" >&2
    return "$status"
}

# Those that the preflight names, and those from which no rank came to meet the others.
unfit_nodes() {
    sed -n -e 's/^preflight: \([^ ]*\) (ranks\? [^)]*): .*/\1/p' -e 's/.*; nobody came from \(.*\)\.$/\1/p' "$log"/*.log |
        tr -d ' ' | tr , '\n' | sort -u
}

# Whether only some of the nodes are at fault: others may do, and no user has to mend anything.
some_nodes_unfit() {
    local unfit
    unfit=$(unfit_nodes | wc -l)
    [[ $unfit -gt 0 && $unfit -lt $SLURM_JOB_NUM_NODES ]]
}

# End an srun that still waits for other ranks two minutes after one has failed. They have ended by then, but for those
# on a node that is gone, and while SLURM has not noticed that (never, if it is soon back), srun waits.
bound() { # srun
    trap - TERM USR1
    while [[ -z $(first_failure) ]]; do
        sleep 5
    done
    sleep 120
    : >"$log/silent"
    kill -KILL "$1"
}

# A command on all processes of the job, whose output is in a file a rank; rank 0 speaks in the job's output, too.
# Its status is that of the first rank to fail.
run_ranks() {
    local status=0 process echo guard first
    srun "${step[@]}" --kill-on-bad-exit=1 "--output=$log/%N-rank-%5t.log" "${container[@]}" "$@" 2>"$log/srun.log" &
    process=$!
    tail -q -s 1 -n +1 -F "--pid=$process" "$log/$MASTER_ADDR-rank-00000.log" 2>/dev/null &
    echo=$!
    bound "$process" >/dev/null 2>&1 &
    guard=$!
    status_of "$process" || status=$?
    kill "$guard" 2>/dev/null || true
    status_of "$echo" || true
    first=$(first_failure)
    if [[ $status -ne 0 && $first =~ 'Exited with exit code '([0-9]+) ]]; then
        status=${BASH_REMATCH[1]}
    elif [[ $first = *": Killed"* ]]; then
        status=137
    fi
    return "$status"
}

# As `train_as_job`. With PMC_BASE the model is first exported from there, a run's output or a checkpoint, to PMC_MODEL,
# unless that is there, and the run starts from it.
fine_tune() { # RECIPE [--section.key VALUE ...]
    if [[ -n $PMC_BASE ]]; then
        listen
        set_up
        [[ -e $PMC_MODEL ]] || alone pmc-llama export "$PMC_BASE" "$PMC_MODEL"
        set -- "$@" --model.initialize_from "$PMC_MODEL"
    fi
    train_as_job "$@"
}

# Build a corpus by one process a node. What is made is kept, so a killed process or a job that ran out of time
# costs the parts that it was at.
build_as_job() { # the arguments of `pmc-data build`
    set_up
    trap 'scontrol requeue "$SLURM_JOB_ID"' USR1
    local status process try
    for try in $(seq 0 "${PMC_MAX_RESTARTS:-3}"); do
        status=0
        # The others take over what a killed one was at, and must not be ended with it.
        srun "${step[@]}" --kill-on-bad-exit=0 "${container[@]}" pmc-data build --shared "$@" &
        process=$!
        status_of "$process" || status=$?
        [[ $status -ne 0 && $status -ne 2 ]] || break
        say "build $try ended with status $status"
    done
    exit "$status"
}
