#!/usr/bin/env bash
## Trains on the GPUs of this machine, or with 4 CPU processes.
##
##   launchers/local.sh [PRESET] [section.key=value ...]            the default preset is digits
##   launchers/local.sh promoe_b parallel.ep=2 data.source=latents data.path=latents/train
##   NPROC=2 launchers/local.sh digits --dry-run
##
## Repeat the command to continue. Ranks other than 0 write to RUN_DIR/logs.
##
##   NPROC            number of ranks; default: the number of GPUs of this machine, or 4
##   RETRIES          number of restarts after failures; default: 0
##   RUN_DIR          the run directory; default: runs/PRESET
set -euo pipefail

here=$(dirname "$(realpath "$0")")
# shellcheck source-path=SCRIPTDIR source=prologue.sh
source "$here/prologue.sh"

read_preset_and_words "$@"
local_ranks
find_program
prepare_training "$ranks"
command=("$python" -m torch.distributed.run --standalone "--nproc-per-node=$ranks" "--max-restarts=${RETRIES:-0}")
if ((ranks > 1)); then # only rank 0 writes to the terminal, which shows the progress bar
    printf -v redirects '%d:3,' $(seq 1 $((ranks - 1)))
    command+=("--log-dir=$run/logs" "--redirects=${redirects%,}")
fi
start "${command[@]}" -m megapromoe "${train[@]}"
