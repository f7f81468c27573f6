"""Counts what the host issues in a training step, from a checkout; `--help` explains it."""

import sys

import checkout  # noqa: F401  # makes the package importable

if __name__ == "__main__":
    from megapromoe.benchmark.launch_program import main

    sys.exit(main(sys.argv[1:]))
