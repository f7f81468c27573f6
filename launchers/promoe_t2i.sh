#!/usr/bin/env bash
#SBATCH --job-name=promoe_t2i
#SBATCH --nodes=2
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
## Trains the text-to-image ProMoE (12.8 B parameters) on 2 to 16 nodes of 8 GPUs.
set -euo pipefail

size=promoe_t2i preset=promoe_t2i_12b
# sbatch runs a copy of this file in another folder; SLURM has the path of the original.
here=${MEGAPROMOE_HOME:+$(realpath "$MEGAPROMOE_HOME")/launchers}
here=${here:-$(dirname "$(realpath "$0")")}
if [[ ! -f $here/slurm.sh ]]; then
    here=$(dirname "$(scontrol show job "$SLURM_JOB_ID" | sed -n '/^ *Command=/{s///;s/\.sh .*/.sh/;p;q}')")
fi
# shellcheck source-path=SCRIPTDIR source=promoe.sh
source "$here/promoe.sh"
main "$@"
