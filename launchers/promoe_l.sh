#!/usr/bin/env bash
#SBATCH --job-name=promoe_l
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
## Trains ProMoE-L (1.06 B parameters) on nodes of 8 GPUs.
set -euo pipefail

preset=promoe_l
# sbatch runs a copy of this file in another folder; SLURM has the path of the original.
here=${MEGAPROMOE_HOME:+$(realpath "$MEGAPROMOE_HOME")/launchers}
here=${here:-$(dirname "$(realpath "$0")")}
if [[ ! -f $here/slurm.sh ]]; then
    here=$(dirname "$(scontrol show job "$SLURM_JOB_ID" | sed -n '/^ *Command=/{s///;s/\.sh .*/.sh/;p;q}')")
fi
# shellcheck source-path=SCRIPTDIR source=promoe.sh
source "$here/promoe.sh"
main "$@"
