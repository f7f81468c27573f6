#!/usr/bin/env bash
## Trains on this machine: on its GPUs, or on 4 CPU processes.
##
##   launchers/local.sh [PRESET] [section.key=value ...]            the preset is digits unless named
##   launchers/local.sh promoe_b parallel.ep=2 data.source=latents data.path=latents/train
##   NPROC=2 launchers/local.sh digits --dry-run
##
## Repeat the command to continue. Ranks other than 0 write to RUN_DIR/logs.
##
##   NPROC            ranks; default: the GPUs of this machine, or 4
##   RETRIES          restarts after failures; default: 0
##   RUN_DIR          default: runs/PRESET
set -euo pipefail

here=$(dirname "$(realpath "$0")")
# shellcheck source-path=SCRIPTDIR source=prologue.sh
source "$here/prologue.sh"

read_preset_and_words "$@"
local_ranks
find_program
prepare_training
command=("$python" -m torch.distributed.run --standalone "--nproc-per-node=$ranks" "--max-restarts=${RETRIES:-0}")
if ((ranks > 1)); then # rank 0 keeps the terminal, and with it the progress bar
    printf -v redirects '%d:3,' $(seq 1 $((ranks - 1)))
    command+=("--log-dir=$run/logs" "--redirects=${redirects%,}")
fi
start "${command[@]}" -m megapromoe "${train[@]}"
