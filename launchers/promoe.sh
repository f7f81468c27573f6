# shellcheck shell=bash disable=SC2034,SC2154 # variables are shared with those who source this
# The body of promoe_s.sh, promoe_b.sh, promoe_l.sh and promoe_xl.sh, which set `preset`, find `here`, and call `main`.

# shellcheck source-path=SCRIPTDIR source=slurm.sh
source "$here/slurm.sh"

size=$preset # stays that of the script: PRESET names another model for the same resources
HELP="
  sbatch launchers/$size.sh [section.key=value ...]
  sbatch --nodes=4 launchers/$size.sh data.source=latents data.path=latents/train
  sbatch launchers/$size.sh data.source=synthetic train.steps=1000       random latents, for timing
  bash launchers/$size.sh --dry-run [--nodes=4] [section.key=value ...]
$HELP"

# The default layout on nodes of 8 GPUs: experts over 4 of them, so that tp x ep stays inside a node.
layout() { # GPU, nodes
    local zero=train.deepspeed=bf16_zero1
    case $size.$1 in
        promoe_s.h100) echo parallel.ep=1 $zero ;;
        promoe_s.a100 | promoe_[bl].h100 | promoe_[bl].a100) echo parallel.ep=4 $zero ;;
        # 256 images do not divide over more than 256 data-parallel ranks.
        promoe_xl.h100 | promoe_xl.a100) echo parallel.tp=$(($2 > 32 ? 2 : 1)) parallel.ep=4 $zero ;;
    esac
}
