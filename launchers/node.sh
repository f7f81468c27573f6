#!/usr/bin/env bash
# Runs once on every node before a step: makes the folder for compiled code. Asked to, the first prints a free port.
set -euo pipefail

# What lies in the folder is executed: nobody else may own it.
mkdir -p "$(dirname "$1")"
mkdir -m 700 "$1" 2>/dev/null || true
if [[ ! -d $1 || ! -O $1 || -L $1 ]]; then
    echo "${SLURMD_NODENAME:-$HOSTNAME}: $1 cannot be made, or is of another user; set NODE_CACHE" >&2
    exit 1
fi
if [[ ${2:-} == ask && ${SLURM_NODEID:-0} == 0 ]]; then
    python=${MEGAPROMOE_PYTHON:-python3}
    [[ -z ${CONTAINER_IMAGE:-} ]] || python=python3 # the other is the container's
    "$python" -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])'
fi
