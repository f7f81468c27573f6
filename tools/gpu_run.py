"""Measures on a GPU that is available for a short time, from a checkout; `--help` explains it."""

import sys
from pathlib import Path

import checkout

if __name__ == "__main__":
    from megapromoe.benchmark.gpu_program import main

    sys.exit(main(sys.argv[1:], Path(checkout.ROOT)))
