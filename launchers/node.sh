#!/usr/bin/env bash
# Runs once on every node before a step: creates the folder for compiled code. With the argument "ask" the first node
# prints a free port. Exit code 2: repeating the job on these nodes cannot help.
set -euo pipefail

# Code in the folder is executed, so it must belong to this user.
mkdir -p "$(dirname "$1")" || true
mkdir -m 700 "$1" 2>/dev/null || true
if [[ ! -d $1 || ! -O $1 || -L $1 ]]; then
    echo "${SLURMD_NODENAME:-$HOSTNAME}: $1 cannot be made, or is of another user; set NODE_CACHE" >&2
    exit 2
fi
if [[ ${2:-} == ask && ${SLURM_NODEID:-0} == 0 ]]; then
    python=${MEGAPROMOE_PYTHON:-python3}
    [[ -z ${CONTAINER_IMAGE:-} ]] || python=python3 # MEGAPROMOE_PYTHON is a path inside the container
    # The search starts at a different port for each job, so that two jobs on one node at the same time do not get the
    # same. Ports are below 30000, because the kernel uses those above 32767 for outgoing connections.
    "$python" - "${SLURM_JOB_ID:-$$}" "${SLURM_STEP_ID:-0}" <<'PYTHON'
import socket
import sys

job, step = map(int, sys.argv[1:])
for number in range(10000):
    port = 20000 + (17 * job + step + number) % 10000
    with socket.socket() as s:
        try:
            s.bind(("", port))
        except OSError:
            continue
    print(port)
    break
else:
    sys.exit("no port of 20000 to 29999 is free; set MASTER_PORT")
PYTHON
fi
