#!/usr/bin/env bash
#SBATCH --job-name=scaling_experts
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=12
#SBATCH --time=12:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%A_%a.log
## Runs a planned scaling study as an array of jobs, one training run each. From the study's folder:
##
##   megapromoe study plan STUDY_DIR ...                  writes the study, prints its cost
##   megapromoe study submit STUDY_DIR [sbatch options]   calls sbatch --array=... on this script
##   megapromoe study collect STUDY_DIR
##
##   sbatch --array=0-11%4 launchers/scaling_experts.sh STUDY_DIR      the same by hand: tasks 0 to 11, 4 at a time
## With --evaluate after STUDY_DIR, the job evaluates images of tasks that are already trained; `submit` does this for a
## recipe with a section `evaluate`. --retries=N is passed to `study run`: starts after failures that can pass.
set -euo pipefail

# sbatch runs a copy of this file in another folder; SLURM has the path of the original.
here=${MEGAPROMOE_HOME:+$(realpath "$MEGAPROMOE_HOME")/launchers}
here=${here:-$(dirname "$(realpath "$0")")}
if [[ ! -f $here/slurm.sh ]]; then
    here=$(dirname "$(scontrol show job "$SLURM_JOB_ID" | sed -n '/^ *Command=/{s///;s/\.sh .*/.sh/;p;q}')")
fi
# shellcheck source-path=SCRIPTDIR source=slurm.sh
source "$here/slurm.sh"

dry_run='' study='' options=()
for word in "$@"; do
    case $word in
        --help | -h) usage && exit 0 ;;
        --dry-run) dry_run=1 ;;
        --evaluate) options+=(--evaluate) ;;
        --retries=*) options+=(--retries "${word#*=}") ;;
        -*) die "$word: put options of sbatch before the script" 2 ;;
        *) [[ -z $study ]] || die "$word: one STUDY_DIR only" 2; study=$word ;;
    esac
done
[[ -n $study ]] || die "give STUDY_DIR; see --help" 2
# `submit` calls sbatch in the folder of the logs. Paths in a study are relative to the folder in which `submit` was called.
[[ -z ${MEGAPROMOE_STUDY_CWD:-} ]] || cd "$MEGAPROMOE_STUDY_CWD" || die "MEGAPROMOE_STUDY_CWD is no folder of this node" 2
[[ -f $study/study.yaml ]] || die "$study contains no study.yaml; plan it first: megapromoe study plan $study" 2
task=${SLURM_ARRAY_TASK_ID:-}
[[ -n $task || -n $dry_run ]] || die "this script must run as a job array: sbatch --array=0-N launchers/scaling_experts.sh $study" 2
find_program
# A launcher such as torchrun starts a rank for each GPU in one task of the job; srun starts a task for each.
ranks_of_task=$((${SLURM_GPUS_ON_NODE:-1} / ${SLURM_NTASKS_PER_NODE:-1}))
threads=$((${SLURM_CPUS_PER_TASK:-12} / (ranks_of_task > 1 ? ranks_of_task : 1)))
set_environment $((threads > 1 ? threads : 1))
command=("${program[@]}" study run "$study" --task "${task:-TASK}" ${options[@]+"${options[@]}"})
if [[ -n $dry_run ]]; then
    show "${command[@]}"
    exit 0
fi
if ((${SLURM_NTASKS:-1} > 1)); then # the ranks of a task may be on several nodes, and connect to the first
    export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-12}
    port=$(srun "--nodes=$SLURM_JOB_NUM_NODES" "--ntasks=$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --mpi=none \
        bash "$here/node.sh" "$cache" ask)
    export MASTER_PORT=${MASTER_PORT:-$port} MASTER_ADDR=${MASTER_ADDR:-$(first_address)}
else
    bash "$here/node.sh" "$cache"
fi
install_signal_traps
set_limits
note "task $task of $study on $SLURM_JOB_NODELIST"
"${command[@]}" &
step=$!
wait_for_step
note "exit code $code"
if [[ $code == 75 ]] && may_repeat; then
    repeat
fi
exit "$code"
