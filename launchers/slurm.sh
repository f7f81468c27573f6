# shellcheck shell=bash disable=SC2034,SC2154,SC2016 # variables are used by the scripts that source this
# Training as a job of SLURM: check the nodes, train, save before the time limit, queue again, exclude bad nodes.

# shellcheck source-path=SCRIPTDIR source=prologue.sh
source "$here/prologue.sh"
# shellcheck source-path=SCRIPTDIR source=attempts.sh
source "$here/attempts.sh"

HELP+='

Variables for SLURM (sbatch passes them on):
  RUN_DIR          the run directory; default: runs/JOBNAME-JOBID, the same after the job is queued again
  PREFLIGHT        0: no `megapromoe check` before training; PREFLIGHT_ARGS: more arguments for it
  MIN_NODES        the job may run on fewer nodes than it gets, if the configuration cannot run on all, and goes on with as
                   few after the loss of a node; MAX_NODES: the most nodes that it then asks for, by default those it had.
                   --nodes=MIN-MAX sets both
  RETRIES          number of consecutive failures without a new checkpoint after which the job ends; default: 3
  MEGAPROMOE_HOME  the folder that contains launchers/, if the job cannot determine it
  CONTAINER_IMAGE  image in which the ranks run (pyxis); CONTAINER_MOUNTS=FROM:TO,... adds mounts
  SRUN_ARGS        more options for srun
  MASTER_ADDR      address to which ranks connect; default: that of the first node in the configuration of SLURM
  MASTER_PORT      port for it; default: one reserved by SLURM (MpiParams=ports=...), or a free port of the first node

Outside a job the script submits itself, with options of sbatch that are given as --option=value.
Exit codes: 0 done, 1 failed, 2 wrong configuration, path or installation (never queued again), 3 bad nodes, 75 stopped and
saved, 76 a rank hung.'

main() {
    read_words "$@"
    preset=${PRESET:-$preset}
    if [[ -n ${SLURM_JOB_ID:-} ]]; then
        run_in_job
    else
        submit_job
    fi
}

# On a login node: submits this script; in a dry run prints the commands.
submit_job() {
    local word tasks nodes script script_settings=("${settings[@]}")
    script=$here/$(basename "$0")
    directive() { sed -n "s/^#SBATCH --$1=//p" "$script"; }
    nodes=$(directive nodes) tasks=$(directive ntasks-per-node) name=$(directive job-name)
    for word in "${others[@]}"; do
        case $word in
            --nodes=*) nodes=${word#*=} ;;
            --ntasks-per-node=*) tasks=${word#*=} ;;
            --job-name=*) name=${word#*=} ;;
            --mem-per-gpu=* | --mem-per-cpu=*)
                die "$word: contradicts --mem=0 of the script (all memory of a node); give --mem=SIZE, the memory of a node" 2
                ;;
            --*=* | --exclusive | --no-requeue | --hold) ;;
            *) die "$word: write options of sbatch as --option=value" 2 ;;
        esac
    done
    local least=${nodes%-*} # of --nodes=MIN-MAX
    nodes=${nodes#*-}
    [[ $least$nodes$tasks =~ ^[0-9]+$ ]] || die "--nodes=$nodes --ntasks-per-node=$tasks: must be numbers" 2
    find_program
    if ((least < nodes)); then
        export MIN_NODES=$least MAX_NODES=$nodes
        fit_nodes "$tasks"
        [[ -z $dry_run ]] || show export "MIN_NODES=$MIN_NODES" "MAX_NODES=$MAX_NODES"
    fi
    choose_settings "$nodes"
    check_settings $((nodes * tasks))
    local command=(sbatch "${others[@]}" "$script" "${script_settings[@]}")
    ((${#more[@]} == 0)) || command+=(-- "${more[@]}")
    if [[ -z $dry_run ]]; then
        command -v sbatch >/dev/null || die "sbatch is not on PATH: this machine has no SLURM; see launchers/local.sh" 2
        exec "${command[@]}"
    fi
    show "${command[@]}"
    ranks=$((nodes * tasks)) id=JOBID attempt=JOBID.0 threads=$(directive cpus-per-task)
    plan_steps
}

# In a job, or in an allocation of salloc.
run_in_job() {
    install_signal_traps
    set_limits
    ((${#others[@]} == 0)) || die "${others[*]}: put options of sbatch before the script" 2
    nodes=$SLURM_JOB_NUM_NODES ranks=${SLURM_NTASKS:-}
    [[ -n $ranks ]] || die "the allocation has no number of tasks; allocate with --ntasks-per-node=8" 2
    name=$SLURM_JOB_NAME threads=${SLURM_CPUS_PER_TASK:-1}
    attempt=$id.${SLURM_RESTART_COUNT:-0}
    find_program
    tasks_of_node=${SLURM_NTASKS_PER_NODE:-$((ranks / nodes))}
    if [[ -n ${MIN_NODES:-} ]]; then
        fit_nodes "$tasks_of_node"
        ranks=$((nodes * tasks_of_node))
    fi
    choose_settings "$nodes"
    check_settings "$ranks"
    plan_steps
    [[ -z $dry_run ]] || exit 0

    mkdir -p "$logs" || die "RUN_DIR=$run: cannot be made or written; choose another" 2
    note "attempt $attempt on $members, run directory $run"
    ((nodes == SLURM_JOB_NUM_NODES)) || note "the configuration cannot run on all $SLURM_JOB_NUM_NODES nodes of the job"
    if [[ ${PREFLIGHT:-1} != 0 ]]; then
        run_step check "${check_step[@]}"
    fi
    if ((code == 0)) && [[ -z $asked ]]; then
        run_step rank "${train_step[@]}"
    fi
    conclude
}

# Sets `nodes` to the largest number, down to MIN_NODES, on which the configuration can run. If there is none, `nodes` stays
# and check_settings reports the reason.
fit_nodes() { # ranks of a node
    [[ -z ${CONTAINER_IMAGE:-} ]] || return 0
    local number given=("${settings[@]}")
    for ((number = nodes; number >= MIN_NODES; number--)); do
        choose_settings "$number"
        choose_words
        settings=("${given[@]}")
        if "${program[@]}" show --ranks $((number * $1)) "${chosen[@]}" >/dev/null 2>&1; then
            nodes=$number
            return 0
        fi
    done
}

# Removes settings of the login node or the site that must not affect the steps.
set_limits() {
    # srun fails if a default of the site contradicts the value of the job. Without these, steps have the memory of the job.
    unset SLURM_MEM_PER_CPU SLURM_MEM_PER_GPU SLURM_MEM_PER_NODE
    # SLURM propagates the soft limits of the shell that called sbatch, often 64 KiB of locked memory, with which RDMA does
    # not work. The hard limits are those of the node.
    ulimit -S -l hard 2>/dev/null || true
    ulimit -S -n hard 2>/dev/null || true
}

# Forwards SIGUSR1, which SLURM sends before the time limit, to the ranks.
install_signal_traps() {
    asked='' step='' ran='' code=0
    # The id of one job of an array may equal that of the array.
    id=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
    id=${id:-$SLURM_JOB_ID}
    trap 'note "asked to stop: saving"; asked=1; [[ -z $step ]] || kill -USR1 "$step" 2>/dev/null || true' USR1
    trap 'note "SLURM ends this job"' TERM # SLURM has signalled the ranks too; this shell waits for their exit
}

# Sets the commands of the job: node_step, check_step, train_step. Prints them in a dry run.
plan_steps() {
    set_environment "$threads"
    run=${RUN_DIR:-runs/$name-$id}
    [[ $run == /* ]] || run=$PWD/$run
    logs=$run/logs/$attempt attempts=$run/logs/attempts.tsv members=${SLURM_JOB_NODELIST:-}
    local ask extra container=() port_option=() chosen_nodes=()
    if ((nodes < ${SLURM_JOB_NUM_NODES:-0})); then
        members=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n "$nodes" | paste -sd,)
        chosen_nodes=(-w "$members")
    fi
    read -ra extra <<<"${SRUN_ARGS:-}"
    if [[ -n ${CONTAINER_IMAGE:-} ]]; then
        container=("--container-image=$CONTAINER_IMAGE" "--container-workdir=$PWD")
        container+=("--container-mounts=$PWD:$PWD,$run:$run,$cache:$cache${CONTAINER_MOUNTS:+,$CONTAINER_MOUNTS}")
    fi
    given_port=${MASTER_PORT:-} reserved='' ask=ask
    if [[ -n $given_port ]]; then
        ask=''
    elif slurm_has '^MpiParams .*ports='; then
        reserved=1 ask='' port_option=(--resv-ports=1)
    fi
    # --distribution: consecutive ranks share a node, and within it a socket, like the GPUs. By default SLURM distributes
    # tasks over the sockets in turn, so half of them would be far from their GPU. --export=ALL: also after
    # sbatch --export=NONE. --kill-on-bad-exit=0 --wait=60: when a rank exits, the others have a minute to exit cleanly.
    # --mpi=none: ranks do not use MPI.
    local every_step=(srun --export=ALL --mpi=none) bind=()
    ! slurm_has '^TaskPlugin .*affinity' || bind=(--cpu-bind=cores) # without this plugin SLURM prints a warning at each step
    local common=("${every_step[@]}" --distribution=block:block "${bind[@]}" --kill-on-bad-exit=0 --wait=60)
    common+=("--nodes=$nodes" "--ntasks=$ranks" "--cpus-per-task=$threads" --open-mode=append "${chosen_nodes[@]}")
    common+=("${port_option[@]}" "${container[@]}" "${extra[@]}")
    node_step=("${every_step[@]}" "--nodes=$nodes" "--ntasks=$nodes" --ntasks-per-node=1 "${chosen_nodes[@]}" "${extra[@]}")
    node_step+=(bash "$here/node.sh" "$cache" ${ask:+"$ask"})
    check_step=("${common[@]}" "--output=$logs/check-%4t.log" "${program[@]}" check --preset "$preset" --run-dir "$run")
    check_step+=(--report "$logs/check.json" --bad-nodes "$logs/bad_nodes")
    read -ra extra <<<"${PREFLIGHT_ARGS:-}"
    check_step+=("${extra[@]}" "${settings[@]}")
    train_step=("${common[@]}" "--output=$logs/rank-%4t.log" "${program[@]}" train --preset "$preset" --run-dir "$run")
    train_step+=("${more[@]}" "${settings[@]}")
    if [[ -n $dry_run ]]; then
        show "${node_step[@]}"
        [[ ${PREFLIGHT:-1} == 0 ]] || show "${check_step[@]}"
        show "${train_step[@]}"
    fi
}

# Whether SLURM's configuration has such a line. True without SLURM, so that a dry run prints the usual commands.
slurm_has() { # regular expression
    command -v scontrol >/dev/null || return 0
    local config
    config=$(scontrol show config 2>/dev/null) || return 0
    grep -q "$1" <<<"$config"
}

# Runs a step and sets `code` to its exit code. Shows the output of rank 0; every rank has a separate log.
run_step() { # name of its logs, command
    local logs_of=$1 first=$logs/$1-0000.log port follower
    shift
    code=0
    port=$("${node_step[@]}") || code=$?
    if ((code)) || [[ -n $asked ]]; then
        return
    fi
    ran=$logs_of
    [[ -n $reserved ]] || export MASTER_PORT=${given_port:-$port}
    export MASTER_ADDR=${MASTER_ADDR:-$(first_address)}
    touch "$first"
    "$@" &
    step=$!
    tail --pid="$step" --lines=+1 --follow=name --sleep-interval=1 "$first" &
    follower=$!
    wait_for_step
    wait "$follower" || true
}

# The address of the first node, from SLURM: its node names need not be known to DNS.
first_address() {
    local first
    first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    scontrol --oneliner show node "$first" | sed -n 's/.* NodeAddr=\([^ ]*\).*/\1/p'
}

job_field() { scontrol --oneliner show job "$id" | sed -n "s/.* $1=\([^ ]*\).*/\1/p"; }

# Whether this job may be queued again: not if it was cancelled, or if SLURM requeues it.
may_repeat() {
    if [[ $(job_field JobState) != RUNNING ]]; then
        note "SLURM has ended this job (scancel, time limit, or a node that failed: then it is queued again)"
        restore_range
        return 1
    fi
    if [[ $(job_field BatchFlag) != 1 || $(job_field Requeue) != 1 ]]; then
        ((code != 3)) || note "bad nodes: $(paste -sd, "$logs/bad_nodes")"
        note "not to be queued again (salloc, or --no-requeue); repeat the command to continue"
        return 1
    fi
}

# SLURM (22.05) queues a job again after the loss of a node, but with the number of nodes and tasks that it had. Sets the
# range again, so that the job can start on the nodes that are left. SLURM accepts that only of a job that is queued.
restore_range() {
    [[ -n ${MIN_NODES:-} ]] || return 0
    local range=$MIN_NODES-${MAX_NODES:-$SLURM_JOB_NUM_NODES} deadline=$((SECONDS + 15))
    while ((SECONDS < deadline)); do
        if scontrol update "JobId=$id" "NumTasks=$((MIN_NODES * tasks_of_node))" 2>/dev/null \
            && scontrol update "JobId=$id" "NumNodes=$range" 2>/dev/null; then
            note "queued again for $range nodes"
            return 0
        fi
        sleep 1
    done
}

# Queues the job again, without nodes that have failed the check.
repeat() {
    if ((code == 3)); then
        exclude_bad_nodes
    else
        note "queued again"
        trap '' TERM # requeueing also terminates this shell
        scontrol requeue "$id"
    fi
    exit "$code"
}

# The output of the first rank was shown.
last_lines() {
    local log
    for log in "$logs"/*-*.log; do
        [[ $log == *-0000.log || ! -s $log ]] || echo "$(basename "$log" .log): $(tail -n 1 "$log")"
    done
}

# Queues the job again without the bad nodes of the check. SLURM can change the excluded nodes only of a pending job.
exclude_bad_nodes() {
    local bad old
    bad=$(grep -E '^[A-Za-z0-9._-]+$' "$logs/bad_nodes" | paste -sd,) || true
    [[ -n $bad ]] || die "the check failed without a bad node in $logs/bad_nodes" 3
    old=$(job_field ExcNodeList)
    [[ $old != '(null)' ]] || old=''
    note "queued again without $bad"
    trap '' TERM
    scontrol requeuehold "$id"
    scontrol update "JobId=$id" "ExcNodeList=${old:+$old,}$bad" \
        || die "SLURM does not leave out $bad; the job is held: scontrol release $id starts it" 3
    scontrol release "$id"
}
