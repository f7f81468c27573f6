# shellcheck shell=bash disable=SC2034,SC2154 # variables are used by the scripts that source this
# Functions of all launchers. Each sets `preset` and `layout` and sources this file, or slurm.sh, which sources it.

set -euo pipefail

HELP='
Words of the form section.key=value are passed to megapromoe train and override the default layout of the script.
Words after -- are passed to it unchanged:   -- --config my.yaml --allow data.seed
--dry-run checks the configuration and prints the commands, but starts nothing.

Variables:
  PRESET           another preset; the resources stay those of this script
  GPU              h100 (default) or a100: selects the default layout
  RUN_DIR          the run directory; an existing one is continued
  MEGAPROMOE_ENV   a virtual environment; default: .venv next to launchers/ if it exists, else the megapromoe on PATH
  MEGAPROMOE_PYTHON  instead: the path of a Python, which is run with -m megapromoe
  NODE_CACHE       folder on each node for compiled code; default: megapromoe-UID in TMPDIR or /tmp
  NCCL_*, CUDA_DEVICE_MAX_CONNECTIONS, PYTORCH_ALLOC_CONF, OMP_NUM_THREADS: not changed if set'

# After sbatch --export=NONE, or with a list of variables, steps would get no variable of the job, not even PATH.
unset SRUN_EXPORT_ENV
export SLURM_EXPORT_ENV=ALL

die() { # sentence, exit code
    echo "$(basename "$0"): $1" >&2
    exit "${2:-1}"
}

show() { # prints a command, quoted for a shell
    local line
    printf -v line '%q ' "$@"
    echo "${line% }"
}

usage() {
    sed -n 's/^## \{0,1\}//p' "$0"
    echo "$HELP"
}

# Sorts the words of the command line: dry_run, settings and more (for megapromoe train), others (begin with a dash).
read_words() {
    dry_run='' settings=() more=() others=()
    while (($#)); do
        case $1 in
            --help | -h) usage && exit 0 ;;
            --dry-run) dry_run=1 ;;
            --) shift && more=("$@") && break ;;
            -*) others+=("$1") ;;
            [a-z]*.[a-z]*=*) settings+=("$1") ;;
            *) die "'$1': must be section.key=value, or an option written as --option=value; see --help" 2 ;;
        esac
        shift
    done
}

# Sets `settings`, the words of megapromoe train for the configuration without the preset: defaults first, so that later
# words override them. `layout GPU NODES` prints the defaults of the script, or nothing for an unknown GPU.
choose_settings() { # nodes
    local words
    words=$(layout "${GPU:-h100}" "$1")
    [[ -n $words ]] || die "GPU=${GPU:-}: no layout is known for it; h100 or a100" 2
    read -ra words <<<"$words"
    settings=("${words[@]}" "${settings[@]}")
}

# Sets `program`, the words that start megapromoe, and `python`: from MEGAPROMOE_PYTHON, a virtual environment, or PATH. In
# a container they are resolved inside the container, so they are not searched.
find_program() {
    local environment=${MEGAPROMOE_ENV:-}
    python=${MEGAPROMOE_PYTHON:-python3} program=(megapromoe)
    if [[ -n ${MEGAPROMOE_PYTHON:-} ]]; then
        program=("$python" -m megapromoe)
        [[ -z $environment ]] || die "MEGAPROMOE_ENV=$environment MEGAPROMOE_PYTHON=$python: set one of them" 2
    fi
    [[ -z ${CONTAINER_IMAGE:-} ]] || return 0
    if [[ -n ${MEGAPROMOE_PYTHON:-} ]]; then
        "$python" -c 'import megapromoe' 2>/dev/null || die "MEGAPROMOE_PYTHON=$python: does not import megapromoe" 2
        PATH=$(dirname "$(command -v "$python")"):$PATH # for the programs of its environment
        export PATH
        return 0
    fi
    if [[ -z $environment && -x $here/../.venv/bin/megapromoe ]]; then
        environment=$(realpath "$here/../.venv")
    fi
    if [[ -n $environment ]]; then
        [[ -x $environment/bin/megapromoe ]] || die "MEGAPROMOE_ENV=$environment: has no bin/megapromoe" 2
        export PATH=$environment/bin:$PATH VIRTUAL_ENV=$environment
    fi
    command -v megapromoe >/dev/null \
        || die "megapromoe is not on PATH; set MEGAPROMOE_ENV, MEGAPROMOE_PYTHON or CONTAINER_IMAGE" 2
}

# Sets `chosen`, the words that select the configuration: those of `settings` and `more` that are not only for training.
choose_words() {
    local word takes=''
    chosen=(--preset "$preset")
    for word in "${more[@]}"; do
        if [[ -n $takes || $word == --config=* ]]; then
            chosen+=("$word") takes=''
        elif [[ $word == --config ]]; then
            chosen+=("$word") takes=1
        fi
    done
    chosen+=("${settings[@]}")
}

# Reports a wrong configuration before anything is started; `show` needs neither torch nor a GPU.
check_settings() { # ranks
    [[ -z ${CONTAINER_IMAGE:-} ]] || return 0
    choose_words
    if "${program[@]}" show --to-train --ranks "$1" "${chosen[@]}" >/dev/null; then
        return 0
    fi
    # A dry run also succeeds without data; the command above has printed the error that a start would give.
    [[ -n $dry_run ]] && "${program[@]}" show --ranks "$1" "${chosen[@]}" >/dev/null 2>&1 || exit 2
}

# Sets the environment of the ranks. Variables that are already set are not changed.
set_environment() { # threads of a rank
    cache=${NODE_CACHE:-${TMPDIR:-/tmp}/megapromoe-$UID}
    local variable
    variables=(
        "OMP_NUM_THREADS=${OMP_NUM_THREADS:-$1}"
        # The sizes of exchanged rows change in every step; expandable segments avoid fragmentation.
        "PYTORCH_ALLOC_CONF=${PYTORCH_ALLOC_CONF:-expandable_segments:True}"
        # ZeRO's reductions and the exchange of rows overlap with computation: each stream needs its own hardware queue.
        "CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-8}"
        "NCCL_DEBUG=${NCCL_DEBUG:-WARN}"
        PYTHONUNBUFFERED=1 # logs are read while they are written
        "TRITON_CACHE_DIR=$cache/triton"
        "TORCHINDUCTOR_CACHE_DIR=$cache/inductor"
        "TORCH_EXTENSIONS_DIR=$cache/extensions"
        "CUDA_CACHE_PATH=$cache/cuda"
        "MPLCONFIGDIR=$cache/matplotlib"
    )
    for variable in "${variables[@]}"; do
        export "${variable?}"
        [[ -z $dry_run ]] || show export "$variable"
    done
}

# Sets `ranks`: NPROC, or the number of GPUs of this machine, or 4.
local_ranks() {
    local gpus
    gpus=$(nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU') || true
    ranks=${NPROC:-$((gpus > 0 ? gpus : 4))}
    [[ $ranks =~ ^[1-9][0-9]*$ ]] || die "NPROC=$ranks: must be a number" 2
}

# ---- launchers without SLURM: local.sh, mpirun.sh and torchrun.sh

# Sets `preset`, and the variables of read_words.
read_preset_and_words() {
    preset=${PRESET:-digits}
    if [[ ${1:-} =~ ^[a-z0-9_]+$ ]]; then
        preset=$1
        shift
    fi
    read_words "$@"
    ((${#others[@]} == 0)) || die "${others[*]}: unknown; put words for megapromoe train after --" 2
}

# Checks the configuration and sets the environment, `run` and `train`, the words after `megapromoe`. `ranks` are those of
# this machine.
prepare_training() { # ranks of the job
    layout() { echo parallel.ep=1; } # the proposal of `megapromoe plan` for the presets on one machine, for all its GPUs
    choose_settings 1
    check_settings "$1"
    set_environment $(((($(nproc) - 1) / ranks) + 1))
    run=${RUN_DIR:-runs/$preset}
    train=(train --preset "$preset" --run-dir "$run" "${more[@]}" "${settings[@]}")
}

# Replaces this shell by the command; in a dry run prints it.
start() { # command
    if [[ -n $dry_run ]]; then
        show "$@"
        exit 0
    fi
    mkdir -p "$run/logs"
    bash "$here/node.sh" "$cache"
    exec "$@"
}
