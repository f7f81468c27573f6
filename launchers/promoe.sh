# shellcheck shell=bash disable=SC2034,SC2154 # variables are used by the scripts that source this
# The body of promoe_s.sh, promoe_b.sh, promoe_l.sh, promoe_xl.sh and promoe_t2i.sh, which set `preset`, and `size` if the
# script has another name, find `here`, and call `main`.

# shellcheck source-path=SCRIPTDIR source=slurm.sh
source "$here/slurm.sh"

size=${size:-$preset} # the name of the script, whose resources also apply if PRESET selects another model
HELP="
  sbatch launchers/$size.sh [section.key=value ...]
  sbatch --nodes=4 launchers/$size.sh data.source=latents data.path=latents/train
  sbatch launchers/$size.sh data.source=synthetic train.steps=1000       random latents, for timing
  bash launchers/$size.sh --dry-run [--nodes=4] [section.key=value ...]
$HELP"

# The default layout on nodes of 8 GPUs, as proposed by `megapromoe plan`. With 12 experts they are mostly replicated:
# expert parallelism would save memory, which is sufficient on these GPUs, but little time.
layout() { # GPU, nodes
    local zero=train.deepspeed=bf16_zero1 ep=1
    # With few images a GPU, or few FLOPs an image, the update of the experts has a share of the time on an A100.
    case $size.$1 in
        promoe_s.a100) ep=$(($2 > 1 ? 2 : 1)) ;;
        promoe_l.a100) ep=$(($2 == 32 ? 2 : 1)) ;;
    esac
    # The batch of 256 images allows at most 256 data-parallel ranks, so more than 32 nodes need tensor parallelism.
    case $size.$1.$(($2 > 32)) in
        promoe_t2i.*) layout_of_12b "$1" "$2" ;;
        *.h100.0 | *.a100.0) echo parallel.ep=$ep $zero ;;
        promoe_[sb].h100.1 | promoe_[sb].a100.1) echo parallel.tp=2 parallel.ep=$ep $zero ;;
        promoe_l.h100.1 | promoe_l.a100.1 | promoe_xl.h100.1 | promoe_xl.a100.1)
            echo parallel.tp=2 parallel.ep=1 parallel.expert_tp=true $zero
            ;;
    esac
}

# The layout of promoe_t2i_12b: parameters, gradients and optimizer state fit when they are divided over all ranks. The
# blocks of few ranks have so many images that activations are computed again.
layout_of_12b() { # GPU, nodes
    case $1.$2 in
        h100.1 | a100.1) echo parallel.ep=1 train.deepspeed=bf16_zero3 parallel.recompute=blocks ;;
        h100.2 | a100.2) echo parallel.ep=1 train.deepspeed=bf16_zero1 parallel.recompute=blocks ;;
        h100.3 | a100.3) echo parallel.ep=1 train.deepspeed=bf16_zero3 parallel.recompute=moe ;;
        h100.16 | a100.16) echo parallel.ep=1 train.deepspeed=bf16_zero1 ;;
        h100.* | a100.*) echo parallel.ep=1 train.deepspeed=bf16_zero3 ;;
    esac
}
