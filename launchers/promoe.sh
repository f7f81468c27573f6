# shellcheck shell=bash disable=SC2034,SC2154 # variables are used by the scripts that source this
# The body of promoe_s.sh, promoe_b.sh, promoe_l.sh and promoe_xl.sh, which set `preset`, find `here`, and call `main`.

# shellcheck source-path=SCRIPTDIR source=slurm.sh
source "$here/slurm.sh"

size=$preset # the preset of the script, whose resources also apply if PRESET selects another model
HELP="
  sbatch launchers/$size.sh [section.key=value ...]
  sbatch --nodes=4 launchers/$size.sh data.source=latents data.path=latents/train
  sbatch launchers/$size.sh data.source=synthetic train.steps=1000       random latents, for timing
  bash launchers/$size.sh --dry-run [--nodes=4] [section.key=value ...]
$HELP"

# The default layout on nodes of 8 GPUs, as proposed by `megapromoe plan`. With 12 experts they are replicated: expert
# parallelism would save memory, which is sufficient on these GPUs, but no time.
layout() { # GPU, nodes
    local zero=train.deepspeed=bf16_zero1
    # The batch of 256 images allows at most 256 data-parallel ranks, so more than 32 nodes need tensor parallelism.
    case $size.$1.$(($2 > 32)) in
        *.h100.0 | *.a100.0) echo parallel.ep=1 $zero ;;
        promoe_[sb].h100.1 | promoe_[sb].a100.1) echo parallel.tp=2 parallel.ep=1 $zero ;;
        promoe_l.h100.1 | promoe_l.a100.1 | promoe_xl.h100.1) echo parallel.tp=2 parallel.ep=1 parallel.expert_tp=true $zero ;;
        promoe_xl.a100.1) echo parallel.tp=4 parallel.ep=4 parallel.expert_tp=true $zero ;;
    esac
}
