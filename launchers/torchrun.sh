#!/usr/bin/env bash
## Trains on several nodes with torchrun, wherever a platform starts one program on every node: Kubernetes (Kubeflow
## Trainer, JobSet), SkyPilot, or by hand. Start the same command on every node:
##
##   NNODES=2 NODE_RANK=0 MASTER_ADDR=gpu01 launchers/torchrun.sh promoe_l data.source=latents data.path=latents/train
##   NNODES=2:4 NODE_RANK=1 MASTER_ADDR=gpu01 launchers/torchrun.sh promoe_l data.source=synthetic
##   NNODES=2 NODE_RANK=0 MASTER_ADDR=gpu01 launchers/torchrun.sh promoe_l --dry-run
##
## It checks the nodes, trains, and repeats after exit codes 75 and 76 and failures that can pass, from the last checkpoint.
## With NNODES=MIN:MAX it goes on with the nodes that are left. The run directory must be on a file system of all nodes.
##
##   NNODES           number of nodes, or MIN:MAX; default: that of Kubeflow Trainer (PET_NNODES) or SkyPilot, or 1
##   MIN_NODES        instead of MIN, if a platform sets the number of nodes
##   NODE_RANK        number of this node from 0; default: that of Kubeflow Trainer, SkyPilot or an indexed job, or 0
##   MASTER_ADDR      name or address of node 0; default: that of Kubeflow Trainer or SkyPilot
##   MASTER_PORT      port on node 0; the next two must be free too; default: that of Kubeflow Trainer, or 29500
##   NPROC            ranks on each node; default: that of Kubeflow Trainer or SkyPilot, its GPUs, or 4
##   NODE_WAIT        seconds to wait for all nodes before fewer are enough; default: 120
##   NODE_TIMEOUT     seconds without any answer of node 0, or with too few nodes, that are a failure; default: 600
##   RETRIES          number of consecutive failures without a new checkpoint after which the job ends; default: 3
##   PREFLIGHT        0: no `megapromoe check` before training; PREFLIGHT_ARGS: more arguments for it
##   RUN_DIR          the run directory; default: runs/PRESET
set -euo pipefail

here=$(dirname "$(realpath "$0")")
# shellcheck source-path=SCRIPTDIR source=prologue.sh
source "$here/prologue.sh"
# shellcheck source-path=SCRIPTDIR source=attempts.sh
source "$here/attempts.sh"

# Sets nodes, least, node, address and port from the variables of the platform, and NPROC if it sets that.
read_platform() {
    local word ranks_of_platform=${PET_NPROC_PER_NODE:-${SKYPILOT_NUM_GPUS_PER_NODE:-}} hosts=${SKYPILOT_NODE_IPS:-}
    nodes=${NNODES:-${PET_NNODES:-${SKYPILOT_NUM_NODES:-1}}}
    node=${NODE_RANK:-${PET_NODE_RANK:-${SKYPILOT_NODE_RANK:-${JOB_COMPLETION_INDEX:-0}}}}
    address=${MASTER_ADDR:-${PET_MASTER_ADDR:-${hosts%%$'\n'*}}}
    port=${MASTER_PORT:-${PET_MASTER_PORT:-29500}}
    least=${MIN_NODES:-${nodes%%:*}} nodes=${nodes##*:}
    [[ ! $ranks_of_platform =~ ^[1-9][0-9]*$ ]] || NPROC=${NPROC:-$ranks_of_platform} # not "auto" or "gpu"
    unset "${!PET_@}" # torchrun would take them for its own arguments
    if [[ ! $nodes =~ ^[1-9][0-9]*$ || ! $least =~ ^[1-9][0-9]*$ ]] || ((least > nodes)); then
        die "NNODES=$nodes MIN_NODES=$least: must be a number of nodes, or MIN:MAX" 2
    fi
    if [[ ! $node =~ ^[0-9]+$ ]] || ((node >= nodes)); then
        die "NODE_RANK=$node: must be a number from 0 to $((nodes - 1))" 2
    fi
    if [[ ! $port =~ ^[1-9][0-9]{0,4}$ ]] || ((port > 65533)); then
        die "MASTER_PORT=$port: must be a port up to 65533" 2
    fi
    ((nodes > 1)) || address=${address:-127.0.0.1}
    [[ -n $address ]] || die "MASTER_ADDR is not set; give the name or address of node 0" 2
    for word in "NODE_WAIT=${NODE_WAIT:=120}" "NODE_TIMEOUT=${NODE_TIMEOUT:=600}" "RETRIES=${RETRIES:=3}"; do
        [[ ${word#*=} =~ ^[0-9]+$ ]] || die "$word: must be a whole number" 2
    done
}

# Sets `counts`, the numbers of nodes from `least` to `nodes` that the configuration can run on.
find_counts() {
    counts=$nodes
    ((least < nodes)) || return 0
    local number candidates='' possible
    choose_words
    for ((number = least; number < nodes; number++)); do candidates+=$((number * ranks)),; done
    possible=$("${program[@]}" show --which-ranks "${candidates%,}" "${chosen[@]}") || exit 2
    counts=''
    for number in $possible; do counts+=$((number / ranks)),; done
    counts+=$nodes
}

# Sets `attempt_command`: the program that runs an attempt on this node.
plan_attempt() {
    local extra
    logs=$run/logs/$attempt
    attempt_command=("$python" -m megapromoe.distributed.node_attempt "--node=$node" "--counts=$counts")
    attempt_command+=("--ranks-per-node=$ranks" "--address=$address" "--port=$port" "--wait=$NODE_WAIT")
    attempt_command+=("--timeout=$NODE_TIMEOUT" "--job=$run" "--logs=$logs" "--nodes-file=$logs/nodes")
    if [[ ${PREFLIGHT:-1} != 0 ]]; then
        read -ra extra <<<"${PREFLIGHT_ARGS:-}"
        attempt_command+=(-- check --preset "$preset" --run-dir "$run" --report "$run/logs/check.json")
        attempt_command+=(--bad-nodes "$bad_nodes" "${extra[@]}" "${settings[@]}")
    fi
    attempt_command+=(-- "${train[@]}")
}

# Whether this node repeats. It does not if it was asked to stop, or is unfit: then the others go on without it.
may_repeat() {
    if [[ -n $asked ]]; then
        note "asked to stop: repeat the command on every node to continue"
        return 1
    fi
    if ((code == 3)) && grep -qxF "${SLURMD_NODENAME:-$HOSTNAME}" "$bad_nodes"; then
        note "this node failed the check: it leaves the job"
        return 1
    fi
}

repeat() { note "repeated"; }

last_lines() {
    local log
    for log in "$logs"/*/*/attempt_0/[1-9]*/stderr.log; do # the first rank of the node has written to the terminal
        [[ ! -s $log ]] || echo "local rank $(basename "$(dirname "$log")"): $(tail -n 1 "$log")"
    done
}

# Runs attempts until `conclude` ends this shell.
repeat_attempts() {
    local number
    id=$(date +%Y%m%d-%H%M%S)-node$node ran=rank asked='' step=''
    attempts=$run/logs/attempts-node$node.tsv
    trap 'note "asked to stop: saving"; asked=1; [[ -z $step ]] || kill -TERM "$step" 2>/dev/null || true' TERM INT HUP
    trap 'note "asked to save and repeat"; [[ -z $step ]] || kill -USR1 "$step" 2>/dev/null || true' USR1
    for ((number = 0; ; number++)); do
        attempt=$id.$number code=0 members=''
        plan_attempt
        mkdir -p "$logs" || die "RUN_DIR=$run: cannot be made or written; choose another" 2
        note "attempt $attempt, run directory $run"
        "${attempt_command[@]}" &
        step=$!
        wait_for_step
        members=$(cat "$logs/nodes" 2>/dev/null) || true
        conclude
    done
}

read_preset_and_words "$@"
read_platform
local_ranks
find_program
RUN_DIR=${RUN_DIR:-runs/$preset}
[[ $RUN_DIR == /* ]] || RUN_DIR=$PWD/$RUN_DIR
prepare_training $((ranks * nodes))
bad_nodes=$run/logs/bad_nodes id=START attempt=START.0
find_counts
if [[ -n $dry_run ]]; then
    plan_attempt
    show "${attempt_command[@]}"
    exit 0
fi
bash "$here/node.sh" "$cache"
repeat_attempts
