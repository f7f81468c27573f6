"""The package beside this folder, for the programs of this folder: a checkout need not be installed."""

import os
import sys
from pathlib import Path

ROOT = str(Path(__file__).resolve().parents[1])

sys.path.insert(0, ROOT)
# Processes that are started from this one import the same package.
os.environ["PYTHONPATH"] = os.pathsep.join([ROOT, *filter(None, [os.environ.get("PYTHONPATH")])])


def run(command: str) -> int:
    """Runs `megapromoe COMMAND` with the words of this program's command line; returns its exit code."""
    from megapromoe.cli import main

    return main([command, *sys.argv[1:]])
